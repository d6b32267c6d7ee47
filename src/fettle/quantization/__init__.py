"""Linear layers whose frozen weights are stored in few bits."""
