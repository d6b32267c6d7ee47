"""Export: hand a trained model over in the form that others open."""
