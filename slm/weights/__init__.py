"""Weights as nested dicts: axes by leaf name, meshes, trees of leaves, counts."""
