"""GGUF files opened in llama.cpp, with the interfaces of a transformers model and tokenizer."""
