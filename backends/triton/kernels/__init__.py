"""Triton code and its launchers. Importing these modules imports Triton."""
