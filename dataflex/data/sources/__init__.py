"""From files and hubs to rows of text, each with its origin."""
