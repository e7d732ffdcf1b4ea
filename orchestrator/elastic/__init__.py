"""Training jobs on Ray Train, on machines that come and go."""
