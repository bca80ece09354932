"""Checks of a written file against the module that it was written from."""
