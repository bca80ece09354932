"""`python -m nmcompile`: the command line for when the console script is not on the path."""

from nmcompile.cli import main

main()
