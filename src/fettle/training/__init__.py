"""Training: from options to a result with its proof."""
