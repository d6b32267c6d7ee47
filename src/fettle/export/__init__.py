"""Export a trained model in a format that other tools open."""
