"""One module a performance claim; `python -m bench` lists them."""
