"""Masked losses of samples, from logits or from hidden states."""
