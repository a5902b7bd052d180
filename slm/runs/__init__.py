"""A run as a directory: config, checkpoints, cost ledger, and loading it."""
