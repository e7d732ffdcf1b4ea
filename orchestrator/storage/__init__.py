"""Stores (a local folder, an S3 bucket) and the artifacts in them."""
