"""`publish`: finished models into the registry."""
