"""Weights as nested dicts: the axes of leaves, meshes, trees and counts."""
