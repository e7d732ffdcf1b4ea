"""Elastic checkpoints: saved by any number of workers, loaded by any other."""
