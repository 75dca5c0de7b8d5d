"""Sections of the config that have a file of their own, and the types of their fields."""
