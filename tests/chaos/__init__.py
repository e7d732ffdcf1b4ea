"""A storm on a real pipeline: everything a spot market, a store and a tracking server can do to it, in one run.

`make chaos` runs half an hour of it, `make test` two minutes. See docs/elastic.md.
"""
