"""Whether a model can be trained and scored: tried on the model itself."""
