"""The components that a curation makes; apart from the index, whose libraries take long to import."""

from __future__ import annotations

# What it chose, and what it left out. Rows that no curation has seen are in a component of their own.
CHOSEN, LEFT_OUT, UNCURATED = "balanced", "pool", "all"
# What is near to a seed set: a photo of this component may be one of another, too.
RETRIEVED = "retrieved"
# What no stage may train on.
HELD_OUT = "held_out"
