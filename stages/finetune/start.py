"""The backbone that a `finetune` stage starts from, as a model folder that every worker can read."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError, shortened
from orchestrator.stages.base import Context
from orchestrator.storage.open import Needed

if TYPE_CHECKING:
    from orchestrator.models import Backbone
    from orchestrator.models.wrapped_backbone import WrappedBackbone
    from orchestrator.stages.common.network_source import NetworkSource
    from orchestrator.stages.common.weights import WeightsSource
    from orchestrator.stages.finetune.config import Finetune

_KIND = "backbone"
_MODEL = "model"
# Of weights that do not say what they were trained at.
_SIZE = 224
# As the setting `image_size` allows.
_MOST = 2**14


@dataclass(frozen=True)
class StartingBackbone:
    """The trained backbone.

    Attributes:
        folder: as `save_pretrained` or `save_wrapped` wrote it.
        image_size: pixels a side of the images of this stage.
        needed: the artifact that workers on other machines fetch first, as `Context.needed`.
        modules: that may be imported to build it, see `load_wrapped`.
        num_channels: of its images.
        digests: the sha256 of its files by name, for who opens it to compare: the driver does not.
    """

    folder: Path
    image_size: int
    needed: tuple[Needed, ...] = ()
    modules: tuple[str, ...] = ()
    num_channels: int = 3
    digests: Mapping[str, str] = field(default_factory=dict)

    def check_channels(self, pictures: int, stage: str) -> None:
        """Raises UserError if pictures have another number of channels."""
        if pictures != self.num_channels:
            raise UserError(
                f"the backbone sees {self.num_channels} channels, and the pictures have {pictures}",
                where=f"stages.{stage}",
                hint=f"name {self.num_channels} bands as `bands` of the data's `pixels`",
            )

    def needed_of(self, context: Context) -> tuple[Needed, ...]:
        """What workers on other machines fetch first: this backbone, and the other inputs of the stage."""
        backbone = context.inputs.get("backbone")
        if backbone is None:
            return context.needed + self.needed
        return context.needed_of({"backbone": [self.folder.relative_to(backbone.path).as_posix()]})

    def open(self, drop_path: float = 0.0) -> Backbone | WrappedBackbone:
        """The backbone with its weights, on the CPU, in float32.

        Args:
            drop_path: its rate in training; a network from elsewhere has its own.

        Raises:
            UserError: a file of it is damaged.
        """
        from orchestrator.models import from_config, load_pretrained
        from orchestrator.models.configs import ViTConfig
        from orchestrator.models.pixels import set_stats, stats_of
        from orchestrator.models.wrapped_backbone import is_wrapped, load_wrapped
        from orchestrator.training.handed_over import compare

        compare(self.folder, self.digests)
        if is_wrapped(self.folder):
            return load_wrapped(self.folder, self.modules).float()
        loaded = load_pretrained(self.folder).float()
        config = replace(loaded.config, drop_path=drop_path)
        if isinstance(config, ViTConfig):
            # Positions are those of inference: there are few steps to learn others in.
            config = replace(config, rope_rescale=None)
        backbone = from_config(config)
        backbone.load_state_dict(loaded.state_dict())
        set_stats(backbone, *stats_of(loaded))
        return backbone

    def without_weights(self) -> Backbone | WrappedBackbone:
        """The backbone as far as its config says it. Its weights are not read, and are none that anything can use."""
        from orchestrator.models.pretrained import pretrained_without_weights
        from orchestrator.models.wrapped_backbone import is_wrapped, wrapped_without_weights

        if is_wrapped(self.folder):
            return wrapped_without_weights(self.folder, self.modules)
        return pretrained_without_weights(self.folder)


@contextlib.contextmanager
def starting_backbone(config: Finetune, context: Context) -> Iterator[StartingBackbone]:
    """The backbone of a stage under `needs`, or of `from` or `network`, which is written down once.

    Raises:
        UserError: there is none, it cannot be read, or it cannot take images of that size.
    """
    where = f"stages.{context.name}"
    if "backbone" in context.inputs:
        artifact = context.inputs["backbone"]
        folder = _of_artifact(artifact.path, config.student, where)
        yield replace(_start(folder, config, (), context, where), digests=artifact.digests(folder))
        return
    source = config.from_ or config.network
    if source is None:
        hint = "put the stage that trains it in `needs`, or set `from` or `network`"
        raise UserError("there is no trained backbone to start from", where=f"{where}.needs", hint=hint)
    size = config.image_size or (config.network.size if config.network else None) or _SIZE
    identity = {"source": source.identity(), "size": size}
    with context.part(_KIND, identity) as part:
        found = part.artifact
        if found is None:
            made = part.work / "made"
            shutil.rmtree(made, ignore_errors=True)
            if config.from_ is not None:
                _write_weights(config.from_, made / _MODEL, where)
            elif config.network is not None:
                _write_network(config.network, size, made / _MODEL, f"{where}.network")
            found = part.publish(made, {})
        needed = (Needed(context.remote[0].uri, _KIND, part.key),) if context.remote is not None else ()
        yield _start(found / _MODEL, config, needed, context, where)


def _start(
    folder: Path,
    config: Finetune,
    needed: tuple[Needed, ...],
    context: Context,
    where: str,
) -> StartingBackbone:
    from orchestrator.models.lora import add_lora
    from orchestrator.models.pixels import num_channels_of

    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.image_size or record["extra"].get("image_size") or _SIZE
    start = StartingBackbone(folder, int(size), needed, context.modules)
    try:
        backbone = start.without_weights()
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(f"the backbone cannot be opened: {error}", where=where) from error
    start = replace(start, num_channels=num_channels_of(backbone))
    patch = backbone.patch_size
    if start.image_size % patch:
        near = max(1, round(start.image_size / patch)) * patch
        raise UserError(
            f"image_size {start.image_size} is not a multiple of the backbone's patch size {patch}",
            where=f"{where}.image_size",
            hint=f"use {near}",
        )
    if config.mode == "lora":
        try:
            add_lora(backbone, config.lora.targets, config.lora.rank, config.lora.alpha)
        except ValueError as error:
            field = "rank" if str(error).startswith("rank") else "targets"
            hint = "use a smaller rank" if field == "rank" else "name layers that it has, or choose mode full"
            raise UserError(str(error), where=f"{where}.lora.{field}", hint=hint) from None
    return start


def _of_artifact(artifact: Path, student: str | None, where: str) -> Path:
    """The model of a backbone's artifact, or of one of the students of a distillation."""
    folder = artifact / "students"
    if not folder.is_dir():
        return artifact / "model"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    name = student or (names[0] if len(names) == 1 else None)
    if name not in names:
        what = (
            f"there is no student {student!r}"
            if student
            else "`student` is not set, and there is more than one"
        )
        raise UserError(what, where=f"{where}.student", hint=f"use one of {', '.join(names)}")
    assert name is not None
    return folder / name / "model"


def _write_weights(weights: WeightsSource, folder: Path, where: str) -> None:
    from orchestrator.models import save_pretrained
    from orchestrator.models.pixels import stats_of

    try:
        weights.check(None, {})
        backbone = weights.open({})
    except UserError as error:
        raise UserError(error.what, where=f"{where}.{error.where}", hint=error.hint) from None
    found = weights.model({})
    assert found is not None, "weights that were opened are of a known shape"
    extra = _trained_at(weights.folder, f"{where}.from")
    stats = stats_of(backbone)._asdict()
    save_pretrained(folder, backbone.float().state_dict(), found[0], extra, found[1], stats)


def _trained_at(folder: Path | None, where: str) -> dict[str, int]:
    """The size of images that a folder of weights says it was trained at, if it says one."""
    if folder is None or not (folder / "config.json").is_file():
        return {}
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    extra = record.get("extra") if isinstance(record, dict) else None
    size = extra.get("image_size") if isinstance(extra, dict) else None
    if size is None:
        return {}
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _MOST:
        raise UserError(
            f"image_size in the config.json of {folder} is {shortened(repr(size), 40)}",
            where=where,
            hint=f"it must be a whole number from 1 to {_MOST}",
        )
    return {"image_size": size}


def _write_network(source: NetworkSource, size: int, folder: Path, where: str) -> None:
    """A network with its weights, in the layout of trained students."""
    from orchestrator.models.network_spec import NetworkSpec
    from orchestrator.models.wrapped_backbone import WrappedBackbone, save_wrapped
    from orchestrator.stages.common.open_network import open_network

    net = open_network(source, size, "the network", where).net
    library = next(name for name in ("module", "timm", "transformers") if getattr(source, name) is not None)
    name = source.path if library == "module" else str(getattr(source, library))
    try:
        spec = NetworkSpec(library, name, dict(source.kwargs), num_channels=source.num_channels)
        backbone = WrappedBackbone(spec, size)
        backbone.net.load_state_dict(net.state_dict())
    except (ValueError, RuntimeError) as error:
        hint = "give a network whose grid of patches fills `image_size`"
        raise UserError(f"the network cannot be trained: {error}", where=where, hint=hint) from error
    save_wrapped(folder, backbone, pixels={"mean": source.mean, "std": source.std})
