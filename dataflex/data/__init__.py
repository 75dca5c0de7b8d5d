"""Datasets to pools of tokenised samples: info -> source (read, convert) -> tokenize -> load -> collate."""
