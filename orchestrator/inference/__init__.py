"""What a finished model is used for: features of images, a folder as a file of vectors, search in it."""
