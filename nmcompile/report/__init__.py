"""The per-layer report and its forms."""
