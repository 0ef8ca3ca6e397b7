"""Scores of predictions and of written answers."""
