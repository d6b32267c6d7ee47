"""Adapters: LoRA in PEFT's own format, run by fettle's own backward."""
