"""Files, the console, and objects by name: what everything stands on."""
