"""The public verbs, one a file, and what they share."""
