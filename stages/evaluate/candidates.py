"""The models that an evaluation scores: what they are called, and how to load them. All of it can be pickled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.index import pixels_in
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate.shown import spread
from orchestrator.stages.evaluate.towers import Tower, load_tower, outside_tower, random_tower, read_settings
from orchestrator.stages.evaluate.upstream import snapshot_steps, student_folders, taught_elsewhere

if TYPE_CHECKING:
    from orchestrator.stages.evaluate.config import Evaluate
    from orchestrator.storage.artifacts import Artifact

# Of a model from elsewhere, where nothing says a size.
_SIZE = 224


@dataclass(frozen=True)
class Candidate:
    """A tower to score. `picture` names the PNG of its PCA maps, if it gets one."""

    name: str
    family: str
    load: Callable[[], Tower]
    student: str | None = None
    picture: str | None = None


@dataclass(frozen=True)
class _Loader:
    """How this evaluation loads model folders."""

    size: int | None
    where: str
    wanted: str
    trusted: Sequence[str]

    def __call__(self, folder: Path, weights: Path | None = None) -> Tower:
        return load_tower(folder, self.size, self.where, weights, self.wanted, self.trusted)

    def untrained(self, folder: Path, seed: int) -> Tower:
        return random_tower(self(folder), seed)


def candidates(
    stage: Evaluate, context: Context, backbones: Mapping[str, Artifact], tuned: Path | None
) -> Iterator[Candidate]:
    """Random weights of every architecture, the backbone's way through the stages, others' models, the students.

    Args:
        stage, context: the evaluation.
        backbones: the artifacts of backbones by kind, in the order of the recipe.
        tuned: the folder of a fine-tuned model, if there is one.
    """
    students = student_folders(context.inputs.get("students"))
    load = _Loader(
        stage.image_size, f"stages.{context.name}.image_size", context.elastic.device, context.modules
    )
    last = list(backbones.values())[-1].path / "model" if backbones else None
    trained = [
        *([last] if last else []),
        *(folder / "model" for folder in students.values()),
        *([tuned] if tuned else []),
    ]
    yield from _untrained(trained, load, context.seed)
    has_other_teachers = taught_elsewhere(context.inputs.get("students"))
    family = "own backbone" if has_other_teachers else "backbone"
    for kind, artifact in backbones.items():
        model = artifact.path / "model"
        chosen = spread(list(snapshot_steps(artifact.path / "snapshots").items()), stage.num_snapshots)
        for step, weights in chosen[:-1]:
            yield Candidate(f"{kind}, step {step}", family, partial(load, model, weights))
        name = f"{kind}, step {chosen[-1][0]}" if chosen else kind
        if model == last and not has_other_teachers:
            yield Candidate(f"{name} (teacher)", family, partial(load, model), picture="teacher")
        else:
            yield Candidate(name, family, partial(load, model), picture=kind if model == last else None)
    size = stage.image_size or (read_settings(trained[0])[1] if trained else _SIZE)
    pixels = pixels_in(context.inputs["index"].path)
    for name, source in stage.outside.items():
        where = f"stages.{context.name}.models.{name}"
        opened = partial(outside_tower, source, name, size, where, context.elastic.device, pixels)
        yield Candidate(f"model {name}", "from elsewhere", opened, picture=f"model_{name}")
    if tuned is not None:
        yield Candidate("finetune", "fine-tuned", partial(load, tuned))
    for student, folder in students.items():
        yield Candidate(f"student {student}", "student", partial(load, folder / "model"), student, student)


def _untrained(trained: Sequence[Path], load: _Loader, seed: int) -> Iterator[Candidate]:
    drawn: dict[tuple[str, int], Path] = {}
    for folder in trained:
        drawn.setdefault(read_settings(folder), folder)
    sizes = Counter(preset for preset, _ in drawn)
    for (preset, size), folder in drawn.items():
        name = f"random {preset}, {size} px" if sizes[preset] > 1 else f"random {preset}"
        yield Candidate(name, "random weights", partial(load.untrained, folder, seed))
