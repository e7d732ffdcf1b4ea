"""The models of a stage as whoever does not train reads them: from its checkpoints, while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from orchestrator.evaluation.metric import Figure

# What the names of weights begin with → these weights, flat, by the rest of their names: the EMA where there is one.
ReadWeights: TypeAlias = "Callable[[str], Mapping[str, NDArray[np.generic]]]"


@dataclass(frozen=True)
class CheckpointedModel:
    """A model that a stage trains.

    Attributes:
        steps: the number of optimizer steps of its training.
        place: the folder of the finished model in the artifact that has it.
        write: writes a model folder (the second argument) of the weights of a checkpoint.
        piece: the kind and the identity of the piece of the stage's result that it is, see `Context.part`; None of a
            model whose checkpoints are the stage's own.
        score: computes the figures of a model folder; None of a backbone, which is scored by its features of photos.
        chosen_by: the name of the figure by which the stage chooses; None if it chooses by none.
        kept_step: the step of the finished model, by the folder of its artifact; None for the last one.
    """

    steps: int
    place: str
    write: Callable[[ReadWeights, Path], None]
    piece: tuple[str, Mapping[str, Any]] | None = None
    score: Callable[[Path], Mapping[str, Figure]] | None = None
    chosen_by: str | None = None
    kept_step: Callable[[Path], int] | None = None


def write_export(read: ReadWeights, shapes: Mapping[str, Mapping[str, Sequence[int]]], path: Path) -> None:
    """Write weights of a checkpoint into a file as `training.export.load_export` reads it.

    Args:
        read: the checkpoint.
        shapes: of weights, by what their names begin with and the rest of their names. Those that the checkpoint lacks
            are left out: they are not trained.
        path: of the file; its folder is made if it is missing.

    Raises:
        ValueError: a weight has another number of elements than its shape.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[np.generic]] = {}
    for prefix, named in shapes.items():
        flat = read(prefix)
        tensors |= {
            f"{prefix}{name}": flat[name].reshape(tuple(shape))
            for name, shape in named.items()
            if name in flat
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def shapes_of(module: nn.Module) -> dict[str, Sequence[int]]:
    """The shapes of a module's weights and buffers, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
