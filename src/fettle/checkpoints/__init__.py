"""The checkpoint that `--model` names: its folder, files and fingerprint. Imports no model code."""
