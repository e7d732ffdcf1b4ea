"""The side of headless teachers in `distill`: what all of them say about a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.data.blocks import Block
from orchestrator.errors import UserError
from orchestrator.fsio import atomic_write, replacing
from orchestrator.models.wrapped import Tokens
from orchestrator.objectives.whitening import Moments, Whitening
from orchestrator.stages.common.nets import flat_views
from orchestrator.stages.common.network_source import as_recorded
from orchestrator.stages.common.open_network import as_seen, open_network
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.features import OWN, FeatureObjective, TeacherShape, TeacherSource
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.task import in_half
from orchestrator.teacher_service.payload import TEACHER, samples
from orchestrator.training.device import device_type

_SHAPES = "teachers.json"
_WHITENING = "whitening.safetensors"
_JSON = TypeAdapter(dict[str, TeacherShape])


@dataclass(frozen=True)
class Prepared:
    """What must be known of the teachers before the first step, the same for every teacher actor and student.

    Attributes:
        shapes: by teacher.
        whitening: by "NAME.cls" and "NAME.patches"; empty without whitening.
    """

    shapes: Mapping[str, TeacherShape]
    whitening: Mapping[str, Whitening]


class FeatureTeacher:
    """What headless teachers say about a step: NAME.cls (G, B, D) and NAME.patches (G, B, P, D) of what has a weight.

    It follows from the step's number alone.

    Args:
        config: the stage's.
        objective: the teachers, and how their features travel.
        make_views: builds what the teachers look at, and what students fetch besides.
        prepared: from :func:`prepare`, the same for all actors: where features have less rank than dimensions,
            what another machine measures on the same images may be turned otherwise.
        own: `model/` of the stage's teacher artifact, if that is the teacher.

    Raises:
        UserError: a teacher cannot be had, or what it gives is not clear.
    """

    def __init__(
        self,
        config: Distill,
        objective: FeatureObjective,
        make_views: Callable[[], StepViews],
        prepared: Prepared,
        own: Path | None = None,
    ) -> None:
        self._teachers = Teachers(config, objective, own)
        self._views = make_views()
        self._whitening = prepared.whitening
        self._dtype = np.float16 if objective.dtype == "fp16" else np.float32
        self.images_per_step = config.batch_size
        self.images_forwarded = 0
        self._expected: int | None = None

    def expect(self, step: int) -> None:
        """See `Prefetches`: its views are made while the networks work on another."""
        self._expected = step

    def __call__(self, step: int) -> dict[str, dict[str, NDArray[Any]]]:
        """The parts of a step: `TEACHER`, and those of the views."""
        blocks = self._views.blocks(step)
        parts = self._views.parts(step)
        if self._expected is not None:
            self._views.expect(self._expected)
        features = [self._features(block) for block in blocks]
        outputs = {name: np.concatenate([one[name] for one in features], axis=1) for name in features[0]}
        return {TEACHER: {**outputs, **samples(blocks)}, **parts}

    def _features(self, block: Block) -> dict[str, NDArray[Any]]:
        globals_GBCHW = torch.from_numpy(block.arrays["globals"])
        self.images_forwarded += len(block.ids)
        out = {}
        for name, rows in self._teachers(flat_views(globals_GBCHW)):
            white = self._whitening[name](rows) if name in self._whitening else rows
            out[name] = white.unflatten(0, globals_GBCHW.shape[:2]).numpy().astype(self._dtype)
        return out


class Teachers:
    """All networks of an objective, on this process's device; in bfloat16 where students compute in it.

    Args:
        config: the stage's.
        objective: which teachers.
        own: see :class:`FeatureTeacher`.
        wanted: an `elastic.device`: `cpu` uses no GPU.

    Raises:
        UserError: see :class:`FeatureTeacher`.
    """

    def __init__(
        self, config: Distill, objective: FeatureObjective, own: Path | None, wanted: str = "auto"
    ) -> None:
        self._device = device_type(wanted)
        if self._device == "cpu":
            torch.set_num_threads(1)
        self._half = in_half(config, self._device)
        sources = objective.teachers
        if objective.uses_own:
            sources = {OWN: TeacherSource.model_validate({"from": own, "bands": config.teacher_bands})}
        sources = {name: as_recorded(source) for name, source in sources.items()}
        self._sources, self._pixels = sources, config.pixels
        self._terms = {name: objective.terms_of(name) for name in sources}
        for name, source in sources.items():
            try:
                source.channels(self._pixels)
            except UserError as error:
                where = f"features.teachers.{name}.bands" if objective.teachers else "teacher_bands"
                raise UserError(error.what, where=where, hint=error.hint) from None
        self._nets = {
            name: open_network(
                source,
                source.size or config.crops.global_size,
                f"the teacher {name!r}",
                f"features.teachers.{name}",
            ).to(self._device)
            for name, source in sources.items()
        }

    @property
    def shapes(self) -> dict[str, TeacherShape]:
        """What each gives."""
        return {name: TeacherShape(dim=net.dim, grid=net.grid) for name, net in self._nets.items()}

    @torch.inference_mode()
    def __call__(self, images_NCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        """NAME.cls (N, D) and NAME.patches (N, P, D) of uint8 images, fp32 on the CPU, teacher by teacher.

        Only what has a weight, so that nothing else is measured and sent.
        """
        for name, net in self._nets.items():
            seen_NCHW = as_seen(images_NCHW.to(self._device), self._sources[name], net.size, self._pixels)
            with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
                tokens: Tokens = net(seen_NCHW)
            if self._terms[name].uses_cls:
                yield f"{name}.cls", tokens.cls.float().cpu()
            if self._terms[name].patches:
                yield f"{name}.patches", tokens.patches.float().cpu()


def prepare(
    config: Distill,
    objective: FeatureObjective,
    make_views: Callable[[], StepViews],
    own: Path | None = None,
    cache: Path | None = None,
    wanted: str = "auto",
) -> Prepared:
    """Probe all teachers, and measure their whitening on the images of the first steps.

    Args:
        config, objective, make_views, own: see :class:`FeatureTeacher`.
        cache: folder that keeps the result: what is there is not measured again.
        wanted: an `elastic.device`: `cpu` uses no GPU.

    Raises:
        UserError: see :class:`FeatureTeacher`, or features that cannot be whitened.
    """
    if cache is not None and (cache / _SHAPES).is_file():
        return _load(cache)
    teachers = Teachers(config, objective, own, wanted)
    found = _measured(teachers, objective, make_views() if objective.whiten else None)
    if cache is not None:
        _save(found, cache)
    return found


def bytes_per_image(config: Distill, objective: FeatureObjective, shapes: Mapping[str, TeacherShape]) -> int:
    """Bytes of what the teachers say about one image."""
    width = 2 if objective.dtype == "fp16" else 4
    features = sum(
        shape.dim * objective.terms_of(name).rows(shape.grid[0] * shape.grid[1])
        for name, shape in shapes.items()
    )
    return config.crops.num_global * width * features + 8


def _measured(teachers: Teachers, objective: FeatureObjective, views: StepViews | None) -> Prepared:
    if views is None or not objective.whiten:
        return Prepared(teachers.shapes, {})
    moments: dict[str, Moments] = {}
    num_images, step = 0, 0
    while num_images < objective.whiten_images:
        for block in views.blocks(step):
            for name, rows in teachers(flat_views(torch.from_numpy(block.arrays["globals"]))):
                width = rows.shape[-1]
                moments.setdefault(name, Moments(width)).add(rows.reshape(-1, width))
            num_images += len(block.ids)
        step += 1
    return Prepared(teachers.shapes, {name: _whitening(name, found) for name, found in moments.items()})


def _whitening(name: str, moments: Moments) -> Whitening:
    try:
        return moments.whitening()
    except ValueError as error:
        teacher = name.rpartition(".")[0]
        where = f"features.teachers.{teacher}"
        raise UserError(
            f"{name} cannot be whitened: {error}", where=where, hint="set whiten: false"
        ) from None


def _save(prepared: Prepared, folder: Path) -> None:
    """The shapes come last: a folder that has them is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, whitening in prepared.whitening.items()
        for part, tensor in whitening._asdict().items()
    }
    with replacing(folder / _WHITENING) as draft:
        save_file(tensors, draft)
    atomic_write(folder / _SHAPES, _JSON.dump_json(dict(prepared.shapes), indent=1))


def _load(folder: Path) -> Prepared:
    tensors = load_file(folder / _WHITENING)
    names = sorted({name.rpartition(".")[0] for name in tensors})
    return Prepared(
        _JSON.validate_json((folder / _SHAPES).read_bytes()),
        {name: Whitening(tensors[f"{name}.mean_D"], tensors[f"{name}.rotation_DD"]) for name in names},
    )
