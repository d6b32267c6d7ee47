"""Adapters: LoRA in PEFT's own format, computed with fettle's own backward pass."""
