"""Masks and weights of one layer from the inputs that it sees, without training.

The folder knows matrices and no model: `solve` takes a layer's weight and the Hessian of its inputs.
"""
