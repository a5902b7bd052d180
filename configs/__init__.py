"""Training configs: base.py returns the defaults; each other file changes a few keys."""
