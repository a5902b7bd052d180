"""Files, directories that commands write, config schemas and the command line."""
