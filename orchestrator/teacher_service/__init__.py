"""One frozen teacher for many students: its outputs for each step are computed once."""
