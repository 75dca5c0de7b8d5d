"""From scores to chosen samples."""
