"""Accuracy, cost and speed of each exit."""
