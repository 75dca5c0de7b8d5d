"""A run's folder: what is in it, whose it is, and how a run goes on in it."""
