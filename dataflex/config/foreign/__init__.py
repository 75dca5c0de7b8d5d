"""Keys of LLaMA-Factory and transformers that are not ours, and what becomes of them."""
