"""`nmcompile demo`: one small network, trained dense and sparse on real images."""
