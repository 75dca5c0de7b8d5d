"""Rules between keys, which no single field can check, and what is said of a config that keeps them."""
