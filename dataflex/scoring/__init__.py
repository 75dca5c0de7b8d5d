"""Scoring passes: losses and gradient features of samples, leaving the training state bit-identical."""
