"""Who may work on a pipeline: leases that a live process renews, and the queue that settles who gets one."""
