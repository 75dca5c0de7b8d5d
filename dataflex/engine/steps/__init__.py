"""A training step: micro-batches, contributions of hooks, and steps that are left out."""
