"""From rows to token ids, labels, weights and batches."""
