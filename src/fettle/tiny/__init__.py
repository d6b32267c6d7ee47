"""The embedded model: its lessons, its tokenizer, its checkpoint."""
