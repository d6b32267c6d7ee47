"""Models: one decoder for every family, and the way in and out of official checkpoint folders."""
