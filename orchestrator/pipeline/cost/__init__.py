"""What a pipeline costs on stated machines: time, memory, disk, and the split of devices."""
