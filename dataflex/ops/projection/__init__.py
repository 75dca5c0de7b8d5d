"""Random projections of weight gradients that are never written to memory."""
