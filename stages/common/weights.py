"""Weights that a model begins with: where they are, what of that is in the key, and whether they fit.

In a pipeline file it is the key `from` of a stage or a student:

    from: weights/dinov3_vits16.pth     # a file or folder in any known layout
    from: dinov3-vit-s@champion         # a model of the registry
    from: {timm: vit_small_patch16_dinov3.lvd1689m}

Nothing here imports torch before weights are looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PrivateAttr, model_validator

from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings, in_key_if_set, only_one, operational
from orchestrator.errors import KeyMistakeError, UserError, first_line, printable, shortened
from orchestrator.models.configs import RGB, Config
from orchestrator.models.presets import described, preset
from orchestrator.stages.base import Context
from orchestrator.storage.open import Needed
from orchestrator.tracking import references

if TYPE_CHECKING:
    from orchestrator.models import Backbone

logger = logging.getLogger("orchestrator")

_CONFIG = "config.json"
_FILE = "backbone.safetensors"
_KIND = "weights"
# Fields of a model that weights alone do not show: a file of the pipeline may say them.
_HIDDEN = ("num_heads", "norm_eps", "rope_base")
# Fields that training may choose whatever the weights were trained with.
_FREE = ("drop_path", "layer_scale_init", "rope_rescale")
# Tensors that a message names.
_NAMED = 3
_AS_TEACHER = (
    "use them as a teacher: `distill` with `features.teachers: {NAME: {timm: …}}`, or transformers or module"
)


def _from_text(value: Any) -> Any:
    """A path or a model of the registry, written as one text; a bare name is a path."""
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    try:
        reference = references.registered(text)
    except UserError as error:
        raise ValueError(f"{error.what}: {error.hint}") from None
    return {"path": text} if reference is None or reference.is_bare else {"registry": text}


def _spelled(text: str) -> str:
    if not references.parsed(text).is_whole:
        raise ValueError(f"{shortened(text, 80)!r} is not a registered model: write {references.SPELLINGS}")
    return text


class WeightsSource(Settings):
    """The weights that a model begins with. Exactly one of the keys is given.

    A text is short for `registry` if it has the form NAME@ALIAS or NAME:VERSION or begins with `models:/`, else for
    `path`.
    """

    # The key of the stage has the hash of what is in the files instead of their place.
    path: LocalPath | None = operational(
        None,
        description="A folder of `orchestrator pull`, an artifact's folder or its `model/`, or a file or folder of "
        "weights in a known layout (docs/continue.md). For a training checkpoint, the teacher's backbone is used.",
    )
    registry: Annotated[str, AfterValidator(_spelled)] | None = operational(
        None,
        description=f"A model of the registry at `tracking.uri`, as {references.SPELLINGS}; NAME alone is its "
        "champion, or its newest version if there is none.",
    )
    timm: str | None = in_key_if_set(
        None, min_length=1, description="The name of a timm model. timm must be installed."
    )
    transformers: str | None = in_key_if_set(
        None,
        min_length=1,
        description="The name of a transformers model. transformers must be installed.",
    )
    # Where the model of the registry was downloaded to.
    _fetched: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _one(self) -> WeightsSource:
        places = ("path", "registry", "timm", "transformers")
        only_one("weights come from", {name: getattr(self, name) for name in places})
        return self

    def __str__(self) -> str:
        return str(self.path or self.registry or self.timm or self.transformers)

    def fetch(self, uri: str) -> None:
        """Bring the model of the registry to this machine; the version that an alias names now stays the one.

        Args:
            uri: of MLflow.

        Raises:
            UserError: no such model, or the registry cannot be reached.
        """
        if self.registry is not None and self._fetched is None:
            from orchestrator.storage.cache_folder import cache_folder
            from orchestrator.tracking.download import cached

            _, self._fetched = cached(self.registry, uri, cache_folder() / "models")

    @property
    def folder(self) -> Path | None:
        """The file or folder to read; None of a name, and of a model of the registry that is not here yet."""
        path = self.path or self._fetched
        if path is not None and not (path / _CONFIG).is_file() and (path / "model" / _CONFIG).is_file():
            return path / "model"
        return path

    def files(self) -> tuple[Path, ...]:
        """The files whose content decides what is read; none of a name."""
        return () if self.folder is None else weight_files(self.folder)

    def is_there(self) -> bool:
        """Whether the files can be opened; of a name that is not known before its package is asked."""
        if self.folder is None:
            return self.registry is None
        return all(path.is_file() for path in self.files())

    def config(self, overrides: Mapping[str, Any] | None = None) -> Config:
        """The shape of the backbone.

        Args:
            overrides: fields of the model as the pipeline file has them; what weights do not show is taken from there.

        Raises:
            UserError: they cannot be read, or are of no backbone that can be trained here; `where` is `from`.
        """
        known = {name: value for name, value in (overrides or {}).items() if name in _HIDDEN}
        with _explained(self):
            stamps = tuple((path, (found := path.stat()).st_mtime_ns, found.st_size) for path in self.files())
            return _config(self.folder, self.timm, self.transformers, stamps, tuple(sorted(known.items())))

    def open(self, overrides: Mapping[str, Any] | None = None) -> Backbone:
        """The backbone itself, on the CPU; arguments and errors as of :meth:`config`."""
        known = {name: value for name, value in (overrides or {}).items() if name in _HIDDEN}
        with _explained(self):
            return _open(self.folder, self.timm, self.transformers, known)

    def model(self, overrides: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """The model that fits as preset and overrides, `overrides` among them; None if that is not known yet."""
        if not self.is_there():
            return None
        try:
            name, found = described(self.config(overrides))
        except (UserError, ValueError):
            return None  # `check` says it
        return name, {**found, **overrides}

    def check(self, model: str | None, overrides: Mapping[str, Any]) -> None:
        """See whether the weights can be read, and fit the model if one is given.

        Raises:
            UserError: they do not; `where` is the field.
        """
        found = self.config(overrides)
        with _explained(self):
            name, differing = described(found)
        try:
            wanted = preset(model, **overrides) if model else preset(name, **{**differing, **overrides})
        except ValueError as error:
            raise UserError(str(error), where="model_overrides") from None
        if "num_channels" not in overrides or found.num_channels == RGB:
            # What pictures need is known with the data, and three channels are widened to any number.
            wanted = dataclasses.replace(wanted, num_channels=found.num_channels)
        elif found.num_channels != wanted.num_channels:
            raise UserError(
                f"the weights of {self} see {found.num_channels} channels, and the pictures have "
                f"{wanted.num_channels}",
                where="from",
                hint=f"name {found.num_channels} bands as `bands` of the data's `pixels`; only weights of 3 channels "
                "are widened to others",
            )
        mistake = _misfit(found, wanted)
        if mistake is None:
            return
        hint = f"set model: {name}"
        shown = {key: value for key, value in differing.items() if key not in (*_FREE, "num_channels")}
        if shown:
            hint += (
                f" with model_overrides: {{{', '.join(f'{key}: {value}' for key, value in shown.items())}}}"
            )
        raise UserError(
            f"the weights of {self} do not fit model {model or name}: {mistake}",
            where="model" if model else "model_overrides",
            hint=hint,
        )


# The field of a pipeline file: a text or a mapping.
From = Annotated[WeightsSource, BeforeValidator(_from_text, json_schema_input_type=str | WeightsSource)]


def from_field(description: str) -> Any:
    """The field `from` of a stage or a student."""
    return in_key_if_set(None, alias="from", description=description)


FROM = (
    "The weights that the backbone starts from: a file or folder in a known layout, or a model of the registry as "
    "NAME@ALIAS or NAME:VERSION (docs/continue.md)."
)


def freeze_field() -> Any:
    """The field `freeze_backbone_steps` of a stage or a student."""
    return in_key_if_set(
        0,
        ge=0,
        description="The number of steps at the start in which the backbone that `from` gives is frozen, so that new "
        "heads settle first.",
    )


def check_frozen(frozen: int, weights: WeightsSource | None, steps: int, at: str = "") -> None:
    """Raises KeyMistakeError unless what is frozen at the start is there, and no longer than training is.

    Args:
        frozen: steps.
        weights: that the backbone starts from.
        steps: of the whole training.
        at: what is in front of the key, such as `students.small.`.
    """
    key = f"{at}freeze_backbone_steps"
    if frozen and weights is None:
        raise KeyMistakeError("there is no trained backbone to freeze", key=key, hint="set `from`, or 0")
    if frozen > steps:
        what = f"freeze_backbone_steps {frozen} is more than the {steps} steps there are"
        raise KeyMistakeError(what, key=key, hint=f"use at most {steps}")


def files_of(weights: Mapping[str, WeightsSource]) -> dict[str, tuple[Path, ...]]:
    """The files of weights by field, as :meth:`Stage.files` has them; a name has none."""
    return {field: files for field, one in weights.items() if (files := one.files())}


def weight_files(path: Path) -> tuple[Path, ...]:
    """What is read of a folder or file of weights; the path itself if there is nothing."""
    folder = path if path.is_dir() else path.parent
    config = (folder / _CONFIG,) if (folder / _CONFIG).is_file() else ()
    if not path.is_dir():
        return (path, *config) if path.is_file() else (path,)
    return (*config, *sorted(path.glob("*.safetensors"))) or (path / "model.safetensors",)


# --- at the start of training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartingWeights:
    """A backbone's weights under our names, as a file that every worker can read.

    Attributes:
        file: safetensors in fp32, each name with `backbone.` in front, as exports have them.
        needed: the artifact that workers on other machines fetch first, as `Context.needed`.
    """

    file: Path
    needed: tuple[Needed, ...]


@contextlib.contextmanager
def starting_weights(
    context: Context,
    weights: WeightsSource,
    model: str,
    overrides: Mapping[str, Any],
    *,
    where: str,
    name: str = "",
) -> Iterator[StartingWeights]:
    """The weights in our layout, made once; a piece of the stage's result as long as the block lasts.

    Args:
        context: of the stage.
        weights: where they are.
        model: the preset of the model.
        overrides: its fields that are replaced.
        where: the key of the pipeline file that names them.
        name: of the student that begins with them; empty for the only model of a stage.

    Weights of three channels are widened for a model of more (:func:`orchestrator.models.pixels.widened`).

    Raises:
        UserError: they do not fit the model.
    """
    identity = {"name": name, "model": model, "model_overrides": dict(overrides)}
    with context.part(_KIND, identity) as part:
        folder = part.artifact
        if folder is None:
            try:
                folder = part.publish(_written(weights, model, overrides, part.work / "made"), {})
            except UserError as error:
                raise UserError(error.what, where=f"{where}.{error.where}", hint=error.hint) from None
        needed = (Needed(context.remote[0].uri, _KIND, part.key),) if context.remote is not None else ()
        yield StartingWeights(folder / _FILE, needed)


def _written(weights: WeightsSource, model: str, overrides: Mapping[str, Any], folder: Path) -> Path:
    from safetensors.torch import save_file

    from orchestrator.models.pixels import FIRST_LAYERS, widened

    wanted = int(overrides.get("num_channels", RGB))
    weights.check(model, {**overrides, "num_channels": wanted})
    state = weights.open(overrides).state_dict()
    layer = next((name for name in FIRST_LAYERS if name in state), None)
    if layer is not None and (channels := state[layer].shape[1]) != wanted:
        logger.info(
            "%s: the first layer of the weights is widened from %d to %d channels: its kernels are repeated and scaled "
            "by %d/%d, as timm does it", weights, channels, wanted, channels, wanted,
        )  # fmt: skip
        state[layer] = widened(state[layer], wanted)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"backbone.{name}": tensor.float().contiguous() for name, tensor in state.items()}, folder / _FILE
    )
    return folder


# --- looking at weights -----------------------------------------------------------------------------------------


def _misfit(found: Config, wanted: Config) -> str | None:
    """What of the weights does not fit a model: its tensors, or else what decides what is computed with them."""
    import torch

    from orchestrator.models import from_config

    with torch.device("meta"):
        ours, theirs = (
            {name: tuple(tensor.shape) for name, tensor in from_config(config).state_dict().items()}
            for config in (wanted, found)
        )
    names = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]
    if names:
        listed = [
            f"{name} is {theirs.get(name, 'missing')}, the model has {ours.get(name, 'none')}"
            for name in names[:_NAMED]
        ]
        more = f"; and {len(names) - _NAMED} more tensors" if len(names) > _NAMED else ""
        return "; ".join(listed) + more
    differing = [
        f"they were trained with {field.name} {getattr(found, field.name)}, the model has "
        f"{getattr(wanted, field.name)}"
        for field in dataclasses.fields(wanted)
        if field.name not in _FREE and getattr(found, field.name, None) != getattr(wanted, field.name)
    ]
    return "; ".join(differing) or None


def unreadable_hint(error: BaseException) -> str | None:
    """What to do with a file that `orchestrator.models.convert.read_weights` refuses; None if that is not why."""
    from orchestrator.models.convert import DamagedWeightsError

    if isinstance(error, DamagedWeightsError):
        return "copy or download the file again, or give another one"
    if "as weights alone" in str(error):
        return "load it where you trust it, and save its state dict with safetensors.torch.save_file"
    return None


@contextlib.contextmanager
def _explained(weights: WeightsSource) -> Iterator[None]:
    """Makes a UserError of whatever files from anywhere, or a package, may raise."""
    from orchestrator.models.convert import PositionsError

    try:
        yield
    except PositionsError as error:
        what = f"training cannot continue from {weights}: {error}"
        raise UserError(what, where="from", hint=_AS_TEACHER) from None
    except ModuleNotFoundError as error:
        raise UserError(str(error), where="from", hint=f"pip install {error.name}") from error
    except Exception as error:
        text = shortened(first_line(printable(error)), 500)
        hint = "give weights in the layout of this project, of Meta's torch hub, timm or transformers"
        if weights.folder is None:
            hint = "check the name and the installation, or download the weights and give their path"
        elif (unreadable := unreadable_hint(error)) is not None:
            hint = unreadable
        elif "num_heads" in text:
            hint = "set model_overrides: {num_heads: …}"
        raise UserError(
            f"the weights of {weights} cannot be used: {text}", where="from", hint=hint
        ) from error


@cache
def _config(
    path: Path | None,
    timm: str | None,
    transformers: str | None,
    stamps: tuple[Any, ...],
    known: tuple[tuple[str, Any], ...],
) -> Config:
    """`stamps` of the files: what they were when they were looked at."""
    from orchestrator.models.convert import config_of

    if path is not None:
        return config_of(path, **dict(known))
    return _open(path, timm, transformers, dict(known)).config


def _open(
    path: Path | None, timm: str | None, transformers: str | None, known: Mapping[str, Any]
) -> Backbone:
    from orchestrator.models.convert import from_timm, from_transformers, load_any

    if path is not None:
        return load_any(path, **known)
    return from_timm(timm) if timm is not None else from_transformers(str(transformers))
