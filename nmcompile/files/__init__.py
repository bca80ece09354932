"""Files that are read and written: atomically, within limits, and without trust in their content."""
