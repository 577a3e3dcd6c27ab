"""Scores of whole models: pictures and rewrites in, numbers with intervals out."""
