"""Small networks written by hand, for kinds that the libraries do not have or hide behind their own code."""
