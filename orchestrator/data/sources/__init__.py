"""Where images and their captions come from."""
