"""Images as training data: decoded, cropped, masked, in blocks, in an order that is a function of the step."""
