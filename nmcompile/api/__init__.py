"""The public verbs, one per file, and what they share."""
