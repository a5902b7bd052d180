"""Training configs: base.py holds every key; each other file changes a few."""
