"""What a finished model is worth on a split: read from its folder, as anyone would, and run over all its images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.blocks import Block
from orchestrator.data.labelled_blocks import SplitBlocks
from orchestrator.models import BackboneFeatures, load_pretrained, normalise
from orchestrator.models.wrapped_backbone import is_wrapped, load_wrapped
from orchestrator.stages.common.predictor import load_predictor
from orchestrator.stages.finetune.goal import Goal, ListsGoal
from orchestrator.training.device import device_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Blocks that are read while one is computed: memory does not grow with the split.
_AHEAD = 2


def score_split(
    goal: Goal,
    blocks: SplitBlocks,
    folder: Path,
    device: str,
    modules: Sequence[str],
    check: Callable[[], None],
) -> dict[str, float]:
    """Figures of a model folder on all images of a split.

    Args:
        goal: the task.
        blocks: of the split.
        folder: of the model.
        device: as `elastic.device`.
        modules: that may be imported to build it, see `load_wrapped`.
        check: called for each block; may raise `Stopped`.

    Raises:
        UserError: an image cannot be read.
    """
    device = device_type(device)
    tower = (load_wrapped(folder, modules) if is_wrapped(folder) else load_pretrained(folder)).to(device)
    predictor = load_predictor(folder, tower.dim)
    assert predictor is not None
    head = predictor.head.to(device)
    total: torch.Tensor | None = None
    listed: list[Any] = []
    with torch.inference_mode():
        for block in _read(blocks):
            check()
            tensors = {name: torch.from_numpy(array).to(device) for name, array in block.arrays.items()}
            images = tensors["images"]
            predictions = head(BackboneFeatures(*tower(normalise(images, tower))), tuple(images.shape[-2:]))
            sums = goal.sums(predictions, tensors)
            total = sums if total is None else total + sums
            if isinstance(goal, ListsGoal):
                listed += goal.listed(predictions, tensors)
    assert total is not None
    metrics = goal.metrics(total.cpu())
    return {**goal.scores(listed), **metrics} if isinstance(goal, ListsGoal) else metrics


def _read(blocks: SplitBlocks) -> Iterator[Block]:
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting = [pool.submit(blocks.load, 0, index) for index in range(min(_AHEAD, blocks.num_blocks))]
        for index in range(blocks.num_blocks):
            block = waiting.pop(0).result()
            if index + _AHEAD < blocks.num_blocks:
                waiting.append(pool.submit(blocks.load, 0, index + _AHEAD))
            yield block
