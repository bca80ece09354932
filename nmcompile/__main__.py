"""`python -m nmcompile`: the command line where the console script is not on the path."""

from nmcompile.cli import main

main()
