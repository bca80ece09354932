"""The plan: which phase of which layer is pruned and quantized, and why."""
