"""Data that is read while it is trained on."""
