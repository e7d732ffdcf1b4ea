"""`align_text`: a text tower for a locked vision tower."""
