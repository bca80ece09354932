"""The run time of a compiled model: layers as three graphs, and the modules that hold them."""
