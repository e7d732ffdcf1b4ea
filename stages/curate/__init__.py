"""`curate`: from a folder of images to a training mix."""
