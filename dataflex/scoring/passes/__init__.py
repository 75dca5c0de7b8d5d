"""Passes that keep something else than losses and gradients: embeddings, expert counts."""
