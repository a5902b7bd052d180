"""Scores of widths and layers, cutting, searching for a shape, the whole recipe."""
