"""A run: the driver, attempts at stages, the cluster, logs and interrupts."""
