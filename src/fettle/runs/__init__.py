"""One training run: options, checkpoints and resume, progress, report."""
