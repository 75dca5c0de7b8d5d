"""Results of scoring passes on disk."""
