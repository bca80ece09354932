"""Checks of a written file against the module that it came from."""
