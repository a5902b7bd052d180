"""Models of other software, in and out."""
