"""Whole tensors out of an elastic checkpoint, by a process that does not train: its workers' parts joined."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.byte_counts import BYTES
from orchestrator.training.checkpoint.format import CheckpointError, CheckpointManifest
from orchestrator.training.checkpoint.storage import CheckpointStorage


def whole_tensors(
    storage: CheckpointStorage, manifest: CheckpointManifest, prefix: str
) -> dict[str, NDArray[np.generic]]:
    """The flat tensors whose keys begin with `prefix`, by the rest of their keys.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint was removed meanwhile.
    """
    from safetensors import safe_open

    numels = {key: count for key, count in manifest.keys.items() if key.startswith(prefix)}
    parts: dict[str, list[NDArray[np.generic]]] = {key: [] for key in numels}
    for rank in range(manifest.world):
        name = manifest.shard(rank)
        storage.fetch(manifest, name)
        try:
            with safe_open(manifest.path / name, "np") as file:
                for key in numels.keys() & file.keys():
                    parts[key].append(file.get_tensor(key))
                    BYTES.read("checkpoint", parts[key][-1].nbytes)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from error
    found = {}
    for key, pieces in parts.items():
        whole = np.concatenate([piece.reshape(-1) for piece in pieces]) if pieces else np.empty(0)
        if len(whole) != numels[key]:
            raise CheckpointError(f"{key} has {len(whole):,} of {numels[key]:,} elements")
        found[key.removeprefix(prefix)] = whole
    return found
