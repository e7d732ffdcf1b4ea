"""From a pool of images to a training mix."""
