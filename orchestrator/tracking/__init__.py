"""What runs tell MLflow, written down first and sent when it answers."""
