"""Generation and scoring with PyTorch models and GGUF files."""
