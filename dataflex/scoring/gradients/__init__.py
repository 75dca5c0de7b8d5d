"""Gradient features of single samples: taps on layers, the sinks that they deliver to, and what is covered."""
