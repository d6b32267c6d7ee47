"""One way of training per file."""
