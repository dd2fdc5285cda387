"""Randomness and statistics."""
