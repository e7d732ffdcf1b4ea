"""What several kinds of stages share."""
