"""From measured costs to who gets how many devices."""
