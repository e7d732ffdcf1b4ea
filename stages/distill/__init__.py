"""`distill`: one frozen teacher, many students."""
