"""Run directories: config, checkpoints, cost ledger, loading."""
