"""A network in integers: steps on images of codes, in place of the modules of a model compiled for inference."""
