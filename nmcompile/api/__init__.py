"""The public verbs, one per file, and their shared parts."""
