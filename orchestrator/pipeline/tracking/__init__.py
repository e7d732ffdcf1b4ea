"""What MLflow gets of a pipeline: its run, its record, the load of the machine, and what was not sent yet."""
