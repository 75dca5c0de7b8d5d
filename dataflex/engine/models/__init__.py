"""The model: loading, adapters, frozen references, and the weights that are handed over."""
