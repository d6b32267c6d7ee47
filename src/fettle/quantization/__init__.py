"""Linear layers with quantized frozen weights."""
