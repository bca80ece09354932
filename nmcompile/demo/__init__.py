"""`nmcompile demo`: the same small network trained dense and sparse on real images."""
