"""Backends, one folder each; `nmcompile.api` lists them in the order in which they are asked."""
