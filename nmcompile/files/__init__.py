"""Files are written atomically, and read within limits and without trust in their content."""
