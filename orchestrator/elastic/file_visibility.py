"""Whether the machines of a cluster see files that this one has: photos, and the folder of the store."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A node starts a process for the question, which imports this package.
_ANSWER_S = 60.0

logger = logging.getLogger("orchestrator")


def other_machines() -> dict[str, str]:
    """The address of each living node of the connected cluster that is on another machine and takes work, by its id."""
    import ray

    from orchestrator.elastic.resources import cluster_nodes

    infos = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    here = infos.get(ray.get_runtime_context().get_node_id())
    workers = {node.name for node in cluster_nodes() if node.takes_work}
    return {name: address for name, address in infos.items() if name in workers and address != here}


def unseen(files: Mapping[str, int], nodes: Mapping[str, str]) -> dict[str, list[str]]:
    """What machines cannot read: by their address, the files that they lack or have with another size.

    A machine that gives no answer, because it leaves or has no room, is left out.

    Args:
        files: sizes in bytes by absolute path.
        nodes: addresses by node id.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(lacking)
    asked: dict[Any, str] = {}
    for node, address in nodes.items():
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ask.options(scheduling_strategy=strategy).remote(dict(files))] = address
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    found = {}
    for reference in answered:
        try:
            found[asked[reference]] = ray.get(reference)
        except RayError as error:
            logger.debug("%s was not asked what it sees: %s", asked[reference], error)
    for reference in late:
        ray.cancel(reference)
    return {address: names for address, names in sorted(found.items()) if names}


def lacking(files: Mapping[str, int]) -> list[str]:
    """The files that this machine cannot read, or has with another size."""
    return [name for name, size in files.items() if not _reads(Path(name), size)]


def _reads(path: Path, size: int) -> bool:
    try:
        with path.open("rb") as file:
            file.read(1)
        return path.stat().st_size == size
    except OSError:
        return False


def samples(folder: Path, files: Sequence[str]) -> dict[str, int]:
    """The first, the middle and the last of some files below a folder, as :func:`unseen` takes them."""
    chosen = dict.fromkeys((files[0], files[len(files) // 2], files[-1])) if files else {}
    root = folder.resolve()
    return {str(root / name): (root / name).stat().st_size for name in chosen}
