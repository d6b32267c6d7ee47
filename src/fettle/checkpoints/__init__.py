"""What a `--model` names: its folder, its files, its fingerprint. Imports no model code."""
