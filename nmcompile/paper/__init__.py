"""`nmcompile paper`: every table and figure of the paper, computed or trained again by one command each."""
