"""What can be known before the first step: of a pipeline, of the services it needs, and of the machine."""
