"""From token ids to answers and scores: PyTorch models and GGUF files."""
