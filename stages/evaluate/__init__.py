"""`evaluate`: metrics of trained models."""
