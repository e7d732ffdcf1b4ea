"""What runs when: a file as it is loaded, the order of its stages, and a folder for each part of a run."""
