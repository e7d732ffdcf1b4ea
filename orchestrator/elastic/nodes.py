"""What Ray knows of the cluster's nodes."""

from __future__ import annotations


def draining_nodes() -> dict[str, int]:
    """Nodes that have announced their end, with their deadline in milliseconds since 1970 (0: none given)."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())
