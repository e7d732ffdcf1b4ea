"""One training job, step by step: what workers do, whoever started them. Knows nothing of Ray."""
