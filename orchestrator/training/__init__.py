"""One training job, step by step: what workers do, whoever started them. Ray is asked for device ids only."""
