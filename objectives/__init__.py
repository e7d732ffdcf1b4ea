"""Training objectives as pure functions on tensors: no state, no process group, no global random numbers."""
