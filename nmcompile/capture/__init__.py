"""Capture: from a module to its conv/linear layers, the graphs that call them, and what data flow says about them."""

from nmcompile.capture.model import capture_model as capture_model
