"""Predicts the memory and time of a run before it starts, and picks a policy for each layer."""
