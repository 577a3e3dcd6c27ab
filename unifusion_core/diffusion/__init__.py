"""Condition and noise in, image out."""
