"""Scores the checkpoints of a stage while it trains: which is the best so far, on a terminal, in MLflow, in a folder.

The watcher reads what training writes and changes nothing of it, so it may run anywhere that sees the store, and be
stopped at any time.
"""
