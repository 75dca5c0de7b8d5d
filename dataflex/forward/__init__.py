"""From a collated batch to the losses of its samples: the one way for training, scoring and evaluation alike."""
