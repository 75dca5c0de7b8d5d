"""The DeepSpeed engine with data decisions around it."""
