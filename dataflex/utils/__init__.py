"""Helpers without knowledge of models, data or engines."""
