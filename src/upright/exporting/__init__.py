"""Checkpoint -> a bundle that proves itself on the real validation split before it appears."""
