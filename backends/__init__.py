"""Backends, one folder each; `nmcompile.api.choose_backends` lists them in the order in which they are asked."""
