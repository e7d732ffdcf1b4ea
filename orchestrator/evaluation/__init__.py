"""Metrics of trained models, and the report that shows them."""
