"""Networks from elsewhere that a pipeline file names: where they come from, what decides a key, what is checked."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, model_validator

from orchestrator import installed
from orchestrator.config.extension import Named
from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import LocalPath
from orchestrator.config.settings import Settings, in_key_if_set, only_one, operational
from orchestrator.data.views import Side
from orchestrator.errors import UserError, nearest
from orchestrator.models.configs import ViTConfig
from orchestrator.models.network_spec import TIMM_RESERVED, Blocks
from orchestrator.slow_import import warn_if_slow
from orchestrator.stages.common.weights import unreadable_hint, weight_files

# ImageNet's, which nearly all public weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CONFIG = "config.json"
BLOCKS_HINT = "set block, cls_block and patch_block to blocks that it has, or leave them out"
_OTHER = "give another sort of network as `module: package.module:callable` with `weights:`"

S = TypeVar("S", bound="NetworkSource")

MODULE = installed.PATH + r"|^[A-Za-z0-9_][\w.\-]*$"
"""An import path, or the name of an installed package's entry point."""
A_MODULE = Named("teachers", by_path=True)


def kwargs_field() -> Any:
    """Of whatever names a network of a package: the arguments that make it."""
    return in_key_if_set(
        {},
        description="Arguments of the callable of `module`, or settings of the model of timm or transformers, by name.",
    )


class NetworkSource(Settings):
    """A network with its weights. Exactly one of `from`, `timm`, `transformers` and `module` is given.

    `from` is a `model/` folder of this project, or a file of weights in any known layout, as safetensors or as saved by
    torch.save. `timm` and `transformers` are names of models in these packages, which must be installed. `module` is a
    callable that returns an nn.Module, or the name of an installed package's, into which `weights` are loaded.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    # The key of the stage has the hash of what is in the files instead of their place.
    from_: LocalPath | None = operational(
        None,
        alias="from",
        description="The path of the weights: a `model/` folder of this project, or a file of weights in any known "
        "layout.",
    )
    timm: str | None = Field(
        None, min_length=1, description="The name of a timm model. timm must be installed."
    )
    transformers: str | None = Field(
        None,
        min_length=1,
        description="The name of a transformers model, or a local folder such as ./weights/mine. transformers must be "
        "installed.",
    )
    module: Annotated[str | None, A_MODULE] = Field(
        None,
        pattern=MODULE,
        description="A callable that returns an nn.Module, as package.module:callable, or by the name of an installed "
        "package's entry point.",
    )
    weights: LocalPath | None = operational(
        None, description="The path of a state dict that is loaded into `module`."
    )
    kwargs: dict[str, Any] = kwargs_field()
    block: int | None = in_key_if_set(
        None,
        ge=1,
        description="The block whose tokens are the features, after the network's final norm, counted from 1. For a "
        "ConvNeXt it is the stage. Default: the last one.",
    )
    cls_block: int | None = in_key_if_set(
        None, ge=1, description="The block of the image feature (CLS), counted from 1. Default: `block`."
    )
    patch_block: int | None = in_key_if_set(
        None, ge=1, description="The block of the patch features, counted from 1. Default: `block`."
    )
    size: Side | None = Field(
        None,
        description="The side that images are resized to for this network, in pixels. It is used if `image_size` "
        "is not set. Default: 224.",
    )
    bands: tuple[Annotated[int, Field(ge=0)], ...] | None = in_key_if_set(
        None,
        min_length=1,
        description="The bands of the pictures that this network sees as its channels, counted from 0 in the files, "
        "such as [2, 1, 0]. They must be among the bands of the data's `pixels`. Default: all of those.",
    )
    mean: tuple[float, ...] = Field(
        _MEAN,
        min_length=1,
        description="The mean of each channel for the normalization of the network's input, on a scale from 0 to 1. "
        "Default: ImageNet's. A network whose number of channels is not three needs one mean per channel.",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        _STD,
        min_length=1,
        description="The standard deviation of each channel for the normalization of the network's input, on a scale "
        "from 0 to 1. Default: ImageNet's. A network whose number of channels is not three needs one per channel.",
    )

    @model_validator(mode="after")
    def _one(self) -> NetworkSource:
        places = {
            "from": self.from_,
            "timm": self.timm,
            "transformers": self.transformers,
            "module": self.module,
        }
        only_one("a network comes from", places)
        if self.weights is not None and self.module is None:
            raise ValueError("`weights` are for `module`: give the file as `from`, or leave weights out")
        if self.kwargs and self.from_ is not None:
            raise ValueError("`kwargs` are for `module`, `timm` and `transformers`: leave them out")
        check_kwargs(self.timm, self.kwargs)
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}: give one for each channel"
            )
        return self

    @property
    def num_channels(self) -> int:
        """The number of channels that the network takes."""
        return len(self.mean)

    def channels(self, pixels: PixelFormat | None) -> tuple[int, ...] | None:
        """Which channels of pictures the network sees, None for all of them.

        Args:
            pixels: how the pictures are seen; None for 8-bit RGB.

        Raises:
            UserError: they have no such bands, or another number of channels than it takes; `where` is the field.
        """
        seen = pixels or PixelFormat()
        try:
            chosen = None if self.bands is None else seen.channels_of(self.bands)
        except ValueError as error:
            raise UserError(str(error), where="bands", hint="name bands of the data's `pixels`") from None
        count = seen.num_channels if chosen is None else len(chosen)
        if count == self.num_channels:
            return chosen
        raise UserError(
            f"{self.shown} takes {self.num_channels} channels, and would see {count}",
            where="bands",
            hint=f"name the {self.num_channels} bands that it sees, such as bands: "
            f"{list(range(self.num_channels))[::-1]}, or give as many numbers as `mean` and `std`",
        )

    @property
    def path(self) -> str:
        """The import path of `module`.

        Raises:
            ExtensionError: no installed package has the name.
        """
        assert self.module is not None
        return installed.path_of("teachers", self.module)

    @property
    def blocks(self) -> Blocks | None:
        """The blocks that it speaks from, None for what the network gives by itself."""
        found = Blocks(self.cls_block or self.block, self.patch_block or self.block)
        return found if any(found) else None

    @property
    def shown(self) -> str:
        """What it is, for people."""
        if self.timm is not None or self.transformers is not None:
            return f"timm {self.timm}" if self.timm is not None else f"transformers {self.transformers}"
        return self.module or (self.from_.name if self.from_ is not None else "")

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files whose content decides this network's outputs, by field; those of a `module` are its own source."""
        if self.from_ is not None:
            return {"from": weight_files(self.from_)}
        if self.transformers is not None and _is_folder(self.transformers):
            return {"transformers": weight_files(Path(self.transformers))}
        found = module_files(self.module)
        if self.weights is not None:
            found["weights"] = (self.weights,)
        return found

    def check(self, global_size: int) -> None:
        """Whether this network is there and takes images of that size if it says no other, without building it.

        Raises:
            UserError: `where` is the field.
        """
        if self.from_ is not None:
            _check_tower(self, self.from_, self.size or global_size)
        elif self.timm is not None:
            check_timm(self.timm)
        elif self.transformers is not None:
            check_installed("transformers")
            if self.blocks is not None:
                _check_blocks(self, _num_layers(Path(self.transformers) / _CONFIG))
        elif self.module is not None:
            check_module(self.module)
            if self.weights is not None:
                _check_weights(self.weights)
            if self.blocks is not None:
                _check_blocks_of_module(self)


def as_recorded(source: S) -> S:
    """A source whose pixels are normalised as its folder's config.json says, unless the pipeline file says it."""
    config = source.from_ / _CONFIG if source.from_ is not None else None
    if config is None or not config.is_file() or source.model_fields_set & {"mean", "std"}:
        return source
    try:
        record = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # What is wrong with it is told by whoever opens the network.
        return source
    told = record if isinstance(record, dict) else {}
    found = {name: tuple(told[name]) for name in ("mean", "std") if isinstance(told.get(name), list)}
    return source.model_copy(update=found) if len({len(one) for one in found.values()} - {0}) == 1 else source


def _is_folder(name: str) -> bool:
    """Whether a name is a folder, there or not: names of models on a server do not begin like paths."""
    return Path(name).is_dir() or name.startswith(("/", "./", "../"))


def module_files(module: str | None) -> dict[str, tuple[Path, ...]]:
    """The source file of a `module`, by that field; none where it cannot be found, which is for a check to tell."""
    with contextlib.suppress(UserError):
        source = _source(installed.path_of("teachers", module)) if module is not None else None
        return {"module": (source,)} if source is not None else {}
    return {}


def check_kwargs(timm: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if arguments of a timm model say where its weights come from."""
    wrong = [name for name in kwargs if name in TIMM_RESERVED] if timm is not None else []
    if wrong:
        raise ValueError(f"{wrong[0]} is not a setting of the network: leave it out of kwargs")


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


def _check_tower(source: NetworkSource, path: Path, size: int) -> None:
    from orchestrator.models.convert import config_of

    try:
        config = config_of(path)
    except (ValueError, FileNotFoundError) as error:
        hint = unreadable_hint(error) or _OTHER
        raise UserError(f"{path}: {error}", where="from", hint=hint) from None
    patch = config.patch_size
    if size % patch:
        raise UserError(
            f"the network's patches of {patch} pixels do not divide what it would see, {size} pixels a side",
            where="from" if source.size is None else "size",
            hint=f"set its size to {max(1, round(size / patch)) * patch}",
        )
    _check_blocks(source, config.depth if isinstance(config, ViTConfig) else len(config.depths))


def _num_layers(config: Path) -> Any:
    """What a local config.json of transformers says; None if there is none, or it says nothing."""
    try:
        record = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record.get("num_hidden_layers") if isinstance(record, dict) else None


def _check_blocks(source: NetworkSource, num_blocks: Any) -> None:
    for field in ("block", "cls_block", "patch_block"):
        wanted = getattr(source, field)
        if isinstance(num_blocks, int) and wanted is not None and wanted > num_blocks:
            what = f"there is no block {wanted}: {source.shown} has blocks 1 to {num_blocks}"
            raise UserError(what, where=field, hint=f"use {num_blocks}, the last one, or leave it out")


def _check_blocks_of_module(source: NetworkSource) -> None:
    """Only the network itself knows which it has."""
    from orchestrator.models.networks import module_network

    try:
        module_network(source.path, kwargs=source.kwargs, blocks=source.blocks)
    except ValueError as error:
        raise UserError(str(error), where="module", hint=BLOCKS_HINT) from None


def _check_weights(path: Path) -> None:
    from orchestrator.models.convert import read_weights

    try:
        read_weights(path)
    except ValueError as error:
        hint = (
            unreadable_hint(error)
            or "give the state dict of the network, such as safetensors.torch.save_file writes"
        )
        raise UserError(str(error), where="weights", hint=hint) from None


def check_installed(package: str) -> None:
    """Raises UserError unless a package is installed."""
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed", where=package, hint=f"pip install {package}")


def check_timm(name: str) -> None:
    """Raises UserError unless timm is installed and has the model."""
    check_installed("timm")
    try:
        with warn_if_slow("timm"):
            timm = importlib.import_module("timm")
    except Exception as error:  # an installation may be broken in any way
        what = f"timm cannot be imported: {type(error).__name__}: {error}"
        raise UserError(what, where="timm", hint="install a torchvision that fits torch") from error
    # Names such as hf-hub:timm/… are not in the list.
    if ":" not in name and not timm.is_model(name):
        close = nearest(name.partition(".")[0], timm.list_models())
        hint = f"did you mean {close}?" if close else "timm.list_models() has the names"
        raise UserError(f"timm has no model {name!r}", where="timm", hint=hint)


def check_module(module: str) -> None:
    """Import what a `module` names.

    Raises:
        UserError: it is not there.
    """
    from orchestrator.models.networks import find_callable

    try:
        path = installed.path_of("teachers", module)
    except UserError as error:
        raise UserError(error.what, where="module", hint=error.hint) from None
    try:
        with warn_if_slow(path.partition(":")[0]):
            find_callable(path)
    except ValueError as error:
        raise UserError(str(error), where="module", hint=_import_hint(path)) from None


def _import_hint(path: str) -> str:
    """What is probably meant; else what makes it importable."""
    module, _, name = path.partition(":")
    found = sys.modules.get(module)
    close = nearest(name, [each for each, value in vars(found).items() if callable(value)]) if found else None
    if close:
        return f"did you mean {module}:{close}?"
    return "install its package, or put its folder on PYTHONPATH, here and on all machines"
