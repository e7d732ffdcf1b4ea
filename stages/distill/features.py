"""Distilling from teachers without heads: which they are, what of them is learnt, and what can be checked of both.

A headless teacher is any backbone. It gives what it sees (a feature of the image and one of each patch), and students
learn to say the same through a projection (AM-RADIO, arXiv 2312.06709).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from orchestrator import installed
from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings, Strict, operational
from orchestrator.data.views import CropConfig, Side
from orchestrator.errors import UserError, nearest
from orchestrator.slow_import import told_if_slow

OWN = "self"
"""The name of the stage's own teacher artifact, where no other teacher is named."""

# ImageNet's, which nearly all public weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CONFIG = "config.json"
_SAFE = "load it where you trust it, and save its state dict with safetensors.torch.save_file"

_OTHER = "give another sort of network as `module: package.module:callable` with `weights:`"

TeacherName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class TeacherShape(Strict):
    """What a headless teacher gives: features of `dim` on `grid` (rows, columns), known after one probing forward."""

    dim: int
    grid: tuple[int, int]


class TeacherSource(Settings):
    """A teacher without heads. Exactly one of `from`, `timm`, `transformers` and `module` is given.

    `from` is a `model/` folder of this project, or a file of weights in any known layout, as safetensors or as saved by
    torch.save. `timm` and `transformers` are names of models in these packages, which must be installed. `module` is a
    callable that returns an nn.Module, or the name of an installed package's, into which `weights` are loaded.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    # The key of the stage has the hash of what is in the files instead of their place.
    from_: LocalPath | None = operational(
        None,
        alias="from",
        description="The path of the teacher: a `model/` folder of this project, or a file of weights in any known "
        "layout.",
    )
    timm: str | None = Field(
        None, min_length=1, description="The name of a timm model. timm must be installed."
    )
    transformers: str | None = Field(
        None,
        min_length=1,
        description="The name or local folder of a transformers model. transformers must be installed.",
    )
    module: str | None = Field(
        None,
        pattern=installed.PATH + r"|^[A-Za-z0-9_][\w.\-]*$",
        description="A callable that returns an nn.Module, as package.module:callable, or by the name of an installed "
        "package's entry point.",
    )
    weights: LocalPath | None = operational(
        None, description="The path of a state dict that is loaded into `module`."
    )
    weight: float = Field(
        1.0, gt=0, description="The weight of this teacher's loss relative to other teachers."
    )
    size: Side | None = Field(
        None,
        description="The side that global crops are resized to for this teacher, in pixels. Default: they are not "
        "resized.",
    )
    mean: tuple[float, float, float] = Field(
        _MEAN,
        description="The mean of each colour channel for the normalization of the teacher's input, on a scale from 0 "
        "to 1. Default: ImageNet's.",
    )
    std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ] = Field(
        _STD,
        description="The standard deviation of each colour channel for the normalization of the teacher's input. "
        "Default: ImageNet's.",
    )

    @model_validator(mode="after")
    def _one(self) -> TeacherSource:
        places = {
            "from": self.from_,
            "timm": self.timm,
            "transformers": self.transformers,
            "module": self.module,
        }
        given = [name for name, value in places.items() if value is not None]
        if len(given) != 1:
            what = f"it has {' and '.join(given)}" if given else "it has none of them"
            raise ValueError(f"a teacher comes from exactly one of {', '.join(places)}: {what}")
        if self.weights is not None and self.module is None:
            raise ValueError("`weights` are for `module`: give the file as `from`, or leave weights out")
        return self

    @property
    def path(self) -> str:
        """The import path of `module`.

        Raises:
            ExtensionError: no installed package has the name.
        """
        assert self.module is not None
        return installed.path_of("teachers", self.module)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files whose content decides this teacher's outputs, by field; those of a `module` are its own source."""
        if self.from_ is not None:
            return {"from": _weight_files(self.from_)}
        if self.transformers is not None and Path(self.transformers).is_dir():
            return {"transformers": _weight_files(Path(self.transformers))}
        found: dict[str, tuple[Path, ...]] = {}
        if self.module is not None:
            # A name that no package has is for `check` to tell.
            with contextlib.suppress(UserError):
                source = _source(self.path)
                found |= {"module": (source,)} if source is not None else {}
        if self.weights is not None:
            found["weights"] = (self.weights,)
        return found

    def check(self, global_size: int) -> None:
        """Whether this teacher can be had and take global crops of that size, without building it.

        Raises:
            UserError: `where` is the field.
        """
        if self.from_ is not None:
            _check_tower(self.from_, self.size or global_size, "from" if self.size is None else "size")
        elif self.timm is not None:
            _check_timm(self.timm)
        elif self.transformers is not None:
            _check_installed("transformers")
        elif self.module is not None:
            _check_module(self)
            if self.weights is not None:
                _check_weights(self.weights)


class FeatureObjective(Settings):
    """Distillation of teachers without heads: cosine and smooth-L1 losses on image and patch features.

    A student has two projections for each teacher, one of CLS and one of the patches. Feature maps with different
    grids are compared on the coarser grid.
    """

    teachers: dict[TeacherName, TeacherSource] = Field(
        default_factory=dict,
        description="The teachers by name. Default: the backbone of the stage's own teacher artifact.",
    )
    cosine_weight: float = Field(
        0.9,
        ge=0,
        le=1,
        description="The weight of the cosine loss, from 0 to 1. The smooth-L1 loss has the rest (arXiv 2312.06709).",
    )
    cls_weight: float = Field(1.0, ge=0, description="The weight of the loss on image features (CLS).")
    patch_weight: float = Field(1.0, ge=0, description="The weight of the loss on patch features.")
    local_weight: float = Field(
        0.0,
        ge=0,
        description="The weight of the loss between the CLS token of local crops and the mean of the teacher's image "
        "features of the global crops.",
    )
    hidden: int | None = Field(
        None,
        ge=1,
        description="The hidden width of the projections, which then have a GELU. Default: projections are linear.",
    )
    whiten: bool = Field(
        False, description="Whether the teachers' features are standardized with PHI-S (arXiv 2410.01680)."
    )
    whiten_images: int = Field(
        512, ge=2, description="The number of training images from which PHI-S is estimated."
    )
    dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="The precision in which teacher features are sent to students."
    )

    @model_validator(mode="after")
    def _learns(self) -> FeatureObjective:
        if self.cls_weight + self.patch_weight + self.local_weight == 0:
            raise ValueError("nothing is learnt: cls_weight, patch_weight and local_weight are all 0")
        if not self.whiten and "whiten_images" in self.model_fields_set:
            raise ValueError("whiten_images is for `whiten: true`: leave it out")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Each teacher's weight."""
        return {name: source.weight for name, source in self.teachers.items()} or {OWN: 1.0}

    @property
    def uses_own(self) -> bool:
        """Whether the stage's teacher artifact is the teacher."""
        return not self.teachers

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files of all teachers, by dotted field below this one; see :meth:`Stage.files`."""
        return {
            f"teachers.{name}.{field}": paths
            for name, source in self.teachers.items()
            for field, paths in source.files().items()
        }

    def check(self, crops: CropConfig) -> None:
        """Look at all teachers before anything runs; their files are there.

        Args:
            crops: the stage's.

        Raises:
            UserError: `where` is the dotted field below this one.
        """
        if self.local_weight and not crops.num_local:
            hint = "set local_weight: 0, or crops.num_local"
            raise UserError("there are no local crops to weigh", where="local_weight", hint=hint)
        for name, source in self.teachers.items():
            try:
                source.check(crops.global_size)
            except UserError as error:
                where = f"teachers.{name}.{error.where}"
                raise UserError(error.what, where=where, hint=error.hint) from None


def _weight_files(path: Path) -> tuple[Path, ...]:
    """What is read of a folder or file of weights; the path itself if there is nothing."""
    folder = path if path.is_dir() else path.parent
    config = (folder / _CONFIG,) if (folder / _CONFIG).is_file() else ()
    if not path.is_dir():
        return (path, *config) if path.is_file() else (path,)
    return (*config, *sorted(path.glob("*.safetensors"))) or (path / "model.safetensors",)


def _source(spec: str) -> Path | None:
    """The file of a module, found without importing its packages: their code may want what is not there."""
    folders = None
    found = None
    names = spec.partition(":")[0].split(".")
    for depth in range(len(names)):
        name = ".".join(names[: depth + 1])
        found = PathFinder.find_spec(name, folders)
        if found is None:
            return None
        folders = found.submodule_search_locations
    assert found is not None
    return Path(found.origin) if found.has_location and found.origin else None


def _check_tower(path: Path, size: int, field: str) -> None:
    from orchestrator.models.convert import config_of

    try:
        patch = config_of(path).patch_size
    except (ValueError, FileNotFoundError) as error:
        hint = _SAFE if "as weights alone" in str(error) else _OTHER
        raise UserError(f"{path}: {error}", where="from", hint=hint) from None
    if size % patch:
        raise UserError(
            f"the teacher's patches of {patch} pixels do not divide what it would see, {size} pixels a side",
            where=field,
            hint=f"set the teacher's size to {max(1, round(size / patch)) * patch}",
        )


def _check_weights(path: Path) -> None:
    from orchestrator.models.convert import read_weights

    try:
        read_weights(path)
    except ValueError as error:
        raise UserError(str(error), where="weights", hint=_SAFE) from None


def _check_installed(package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed", where=package, hint=f"pip install {package}")


def _check_timm(name: str) -> None:
    _check_installed("timm")
    try:
        with told_if_slow("timm"):
            timm = importlib.import_module("timm")
    except Exception as error:  # an installation may be broken in any way
        what = f"timm cannot be imported: {type(error).__name__}: {error}"
        raise UserError(what, where="timm", hint="install a torchvision that fits torch") from error
    # Names such as hf-hub:timm/… are not in the list.
    if ":" not in name and not timm.is_model(name):
        close = nearest(name.partition(".")[0], timm.list_models())
        hint = f"did you mean {close}?" if close else "timm.list_models() has the names"
        raise UserError(f"timm has no model {name!r}", where="timm", hint=hint)


def _check_module(source: TeacherSource) -> None:
    from orchestrator.models.wrapped import find_callable

    try:
        path = source.path
    except UserError as error:
        raise UserError(error.what, where="module", hint=error.hint) from None
    try:
        with told_if_slow(path.partition(":")[0]):
            find_callable(path)
    except ValueError as error:
        hint = "install its package, or put its folder on PYTHONPATH, here and on all machines"
        raise UserError(str(error), where="module", hint=hint) from None
