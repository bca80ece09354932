"""Capture of a model: its conv/linear layers, the graphs that call them, and data-flow facts about them."""

from nmcompile.capture.model import capture_model as capture_model
