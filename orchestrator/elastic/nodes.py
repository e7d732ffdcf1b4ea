"""What Ray knows of the cluster's nodes, and how nodes are started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def draining_nodes() -> dict[str, int]:
    """Nodes that have announced their end, with their deadline in milliseconds since 1970 (0: none given)."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


@contextmanager
def minimal_agents() -> Iterator[None]:
    """Nodes that this process starts meanwhile have agents as where Ray's dashboard is not installed, and no others.

    What the agents serve only a dashboard shows. An autoscaler has nothing to scale here, and workers' lines need
    nobody who brings them to a driver that does not print them. Each of these is a Python process, which costs a node
    seconds of a core at its start.
    """
    from ray._private import utils
    from ray._private.node import Node

    with ExitStack() as changes:
        for home, name, ours in (
            (utils, "get_dashboard_dependency_error", lambda: ImportError("no dashboard is wanted")),
            (Node, "start_monitor", lambda node: None),
            (Node, "start_log_monitor", lambda node: None),
            (Node, "start_api_server", lambda node, **options: None),
        ):
            changes.callback(setattr, home, name, getattr(home, name))
            setattr(home, name, ours)
        yield


@contextmanager
def on_loopback() -> Iterator[None]:
    """A cluster that this process starts meanwhile listens on loopback alone, whichever part of Ray it is.

    It is what Ray does by itself where it supports single machines only; `ray.init` takes no such address elsewhere.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    known, before = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[name] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
