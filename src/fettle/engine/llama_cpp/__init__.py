"""A GGUF file opened in llama.cpp itself, behind the faces of a transformers model and tokenizer."""
