"""The functions that `import orchestrator` gives (docs/python.md). They import what is heavy when they are called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import Stopped, UserError, first_line, printable, shortened
from orchestrator.fsio import open_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from orchestrator.models import Backbone
    from orchestrator.models.wrapped_backbone import WrappedBackbone
    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan import Choice
    from orchestrator.pipeline.workspace import Workspace
    from orchestrator.stages.common.aligned import Aligned
    from orchestrator.storage.artifacts import Artifact

    # A path, a PIL image, or uint8 RGB (H, W, 3).
    ImageLike = str | Path | Image.Image | NDArray[np.uint8]

_STOPPED = 130
# Pixels a side of what a model sees: beyond any.
_MAX_SIDE = 2**14


class RunError(RuntimeError):
    """A run that did not finish: a stage failed. What is done is kept, and the same call goes on.

    Attributes:
        exit_code: that of the command line: 1 a stage failed, 2 a mistake in the file.
    """

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Planned:
    """What would happen to one stage.

    Attributes:
        name: in the pipeline file.
        kind: what it does.
        action: whether it would run, is done already, or was left out by the arguments.
        reasons: why, a line each.
        key: its content key: same key, same artifact.
    """

    name: str
    kind: str
    action: Literal["run", "cached", "left out"]
    reasons: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Result:
    """What one stage made.

    Attributes:
        name: in the pipeline file.
        kind: what it does.
        key: its content key.
        summary: the figures of its summary line.
    """

    name: str
    kind: str
    key: str
    summary: Mapping[str, float]
    _artifact: Artifact = field(repr=False)
    _workspace: Workspace = field(repr=False)

    def folder(self) -> Path:
        """The artifact's folder on this machine, to be read only; fetched first if the store is elsewhere.

        Raises:
            UserError: its files are not as they were written.
        """
        return self._workspace.artifacts().fetch(self._artifact)


@dataclass(frozen=True)
class Model:
    """A trained model to embed with.

    Attributes:
        module: a torch module in eval mode, or a vision and a text tower in one space.
        image_size: pixels a side that it was trained for; None where that is not known.
    """

    module: Backbone | WrappedBackbone | Aligned
    image_size: int | None = None


def run(
    file: str | os.PathLike[str],
    *overrides: str,
    only: Sequence[str] = (),
    first: str | None = None,
    last: str | None = None,
    force: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Result]:
    """Run what has to run of a pipeline and skip what is done, as `orchestrator run` does.

    Args:
        file: the pipeline file. Relative paths in it are relative to the current directory.
        overrides: `key.path=value`, as on the command line.
        only: these stages alone.
        first: this stage and all that depend on it.
        last: this stage and all that it depends on.
        force: stages to make anew though they are there.
        quiet: whether nothing is printed.

    Returns:
        What each stage made, by name, in running order; without stages that were left out and were never made.

    Raises:
        UserError: a mistake in the file, or something that it needs is not there.
        RunError: a stage failed.
        Stopped: Ctrl-C; what is done is kept.
    """
    from rich.console import Console

    from orchestrator.pipeline.check import check
    from orchestrator.pipeline.console import Reporter, print_findings
    from orchestrator.pipeline.run import execute
    from orchestrator.pipeline.workspace import Workspace

    console = Console(quiet=quiet)
    choice = _choice(only, first, last, force)
    loaded = _loaded(file, overrides, needs_data=False)
    found = check(loaded, runs=True, choice=choice)
    print_findings(console, found, incomplete_only=True)
    found.raise_if_any()
    code = execute(loaded, found.stages, Reporter(console, "the same call"), choice=choice)
    if code == _STOPPED:
        raise Stopped(f"{file} was stopped; the same call goes on")
    if code:
        raise RunError(f"{file} did not finish: read `orchestrator status {file}`", code)
    workspace = Workspace(loaded.spec.store)
    results = {}
    for stage in found.stages:
        artifact = workspace.find(stage.parts.kind, stage.key)
        if artifact is not None:
            summary = artifact.manifest.summary
            results[stage.name] = Result(
                stage.name, stage.parts.kind, stage.key, summary, artifact, workspace
            )
    return results


def plan(
    file: str | os.PathLike[str],
    *overrides: str,
    only: Sequence[str] = (),
    first: str | None = None,
    last: str | None = None,
    force: Sequence[str] = (),
) -> dict[str, Planned]:
    """What :func:`run` with the same arguments would do, by stage in running order. Changes nothing.

    Raises:
        UserError: a mistake in the file, or data that is not there, on which keys depend.
    """
    from orchestrator.pipeline.check import check
    from orchestrator.pipeline.load import joined
    from orchestrator.pipeline.plan import plan_of

    choice = _choice(only, first, last, force)
    loaded = _loaded(file, overrides, needs_data=True)
    found = check(loaded, runs=False, choice=choice)
    found.raise_if_any()
    if loaded.missing:
        raise joined(loaded.missing)
    return {
        item.name: Planned(item.name, item.kind, item.action, item.reasons, item.stage.key)
        for item in plan_of(loaded, found.stages, choice)
    }


def load(folder: str | os.PathLike[str], *, trust_module: str | Sequence[str] = ()) -> Model:
    """A trained model from a folder, on the CPU, in eval mode.

    Args:
        folder: what `orchestrator pull` fetched, `model/` or `aligned/` of a stage's artifact, or the artifact itself.
            Weights in other layouts that are known (docs/models.md) load as well.
        trust_module: packages or modules that may be imported if the folder says that its network is made by them,
            such as "my_nets". That runs their code, so by default none is.

    Raises:
        UserError: nothing there, no model that is known, or one that a module makes which is not trusted.
    """
    import json

    from orchestrator.models.wrapped_backbone import UntrustedModuleError, is_wrapped, load_wrapped

    path = _path(folder)
    trusted = (trust_module,) if isinstance(trust_module, str) else trust_module
    if not isinstance(trusted, (list, tuple)) or not all(isinstance(each, str) for each in trusted):
        what = f"trust_module is {shortened(repr(trust_module), 80)}"
        raise UserError(what, hint='give the name of a package, such as "my_nets"')
    for inside in ("model", "aligned"):
        if (path / inside / "config.json").is_file():
            path = path / inside
            break
    config = path / "config.json"
    try:
        record: Any = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if not isinstance(record, dict):
            raise ValueError(f"{config.name} holds no mapping")
        if "output_dim" in record:
            from orchestrator.stages.common.aligned import load_aligned

            aligned = load_aligned(path)
            return Model(aligned, aligned.image_size)
        from orchestrator.models.convert import load_any

        extra = record.get("extra") or {}
        if not isinstance(extra, dict):
            raise ValueError(f"`extra` of {config.name} is no mapping")
        size = extra.get("image_size")
        if size is not None:
            _check_number("image_size", size, _MAX_SIDE)
        if is_wrapped(path):
            return Model(load_wrapped(path, trusted), size)
        return Model(load_any(path), size)
    except UntrustedModuleError as error:
        hint = f"if you trust it, give trust_module={error.module.partition('.')[0]!r}"
        raise UserError(str(error), where=str(path), hint=hint) from error
    except Exception as error:
        # Files from anywhere may be anything; what they make json, safetensors or torch raise is of any type.
        raise UserError(
            f"no model can be loaded: {shortened(first_line(printable(error)), 300)}",
            where=str(path),
            hint="give a folder of `orchestrator pull`, or model/ of a stage's artifact",
        ) from error


def embed(
    model: Model | Backbone | str | os.PathLike[str],
    images: ImageLike | Sequence[ImageLike] | None = None,
    *,
    texts: Sequence[str] | None = None,
    size: int | None = None,
    batch: int = 32,
) -> NDArray[np.float32]:
    """Vectors of length 1 of images, or of texts where the model has a text tower.

    Args:
        model: of :func:`load`, its folder, or a torch module of `orchestrator.models`.
        images: one image or several: a path, a PIL image, or uint8 RGB (H, W, 3).
        texts: instead of images.
        size: pixels a side at which images are seen. Default: what the model was trained for.
        batch: the number of images in one forward pass.

    Returns:
        float32 (N, D), a row each; (D,) of a single image.

    Raises:
        UserError: no such model or file, a file that is no image, a size that the model cannot take, or texts for a
            model that takes none.
    """
    if size is not None:
        _check_number("size", size, _MAX_SIDE)
    _check_number("batch", batch, 2**20)
    loaded = _model(model)
    embed_texts = getattr(loaded.module, "embed_texts", None)
    if (images is None) == (texts is None):
        raise UserError("embed takes images or texts, and one of them")
    if texts is not None:
        if embed_texts is None:
            raise UserError("this model has no text tower", hint="load what a stage of kind align_text made")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("texts is a list of texts", hint='give texts=["a dog", "a cat"]')
        vectors: NDArray[np.float32] = embed_texts(list(texts))
        return vectors
    assert images is not None
    is_one = not isinstance(images, (list, tuple))
    photos: list[ImageLike] = [images] if is_one else list(images)  # type: ignore[list-item, arg-type]
    found = _embedded(loaded, photos, size, batch)
    return found[0] if is_one else found


def _embedded(model: Model, photos: Sequence[ImageLike], size: int | None, batch: int) -> NDArray[np.float32]:
    import numpy as np
    import torch
    from torch.nn.functional import normalize

    from orchestrator.models import preprocess
    from orchestrator.stages.common.aligned import Aligned

    module = model.module
    if isinstance(module, Aligned):
        if size not in (None, module.image_size):
            raise UserError(f"this model sees images at {module.image_size} pixels", hint="leave `size` out")
        return module.embed_images([np.asarray(_opened(photo).convert("RGB")) for photo in photos])
    size = size or model.image_size
    patch = module.patch_size
    if size is None or size % patch:
        what = f"the model's patches of {patch} pixels do not fill {size} pixels a side"
        raise UserError(
            what if size else "it is not known at which size the model sees images",
            hint=f"give size={max(1, round((size or 224) / patch)) * patch}",
        )
    device = next(module.parameters()).device
    rows = []
    with torch.inference_mode():
        for start in range(0, len(photos), batch):
            taken = [preprocess(_opened(photo), size) for photo in photos[start : start + batch]]
            rows.append(normalize(module(torch.cat(taken).to(device)).cls.float(), dim=-1).cpu())
    vectors: NDArray[np.float32] = torch.cat(rows).numpy() if rows else np.empty((0, 0), np.float32)
    return vectors


def _opened(photo: ImageLike) -> Image.Image:
    from PIL import Image

    from orchestrator.config.schema import MAX_PIXELS
    from orchestrator.data.decode import FORMATS

    if isinstance(photo, Image.Image):
        return photo
    where = str(photo) if isinstance(photo, (str, os.PathLike)) else None
    try:
        if isinstance(photo, (str, os.PathLike)):
            # A pipe is not waited for, and the size is compared before any pixel is decoded.
            with open_regular(os.fspath(photo)) as file, Image.open(file, formats=tuple(FORMATS)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} is more than {MAX_PIXELS:,} pixels")
                image.load()
                return image
        made = Image.fromarray(photo)
    except (OSError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        raise UserError(f"this is no image: {shortened(first_line(error), 200)}", where=where) from error
    if 0 in made.size:
        raise UserError(f"this is no image: it has {made.width} × {made.height} pixels")
    return made


def _path(given: object) -> Path:
    """Raises UserError unless `given` is a path."""
    if not isinstance(given, (str, os.PathLike)):
        raise UserError(f"this is no path: {shortened(repr(given), 80)}")
    return Path(given)


def _check_number(name: str, value: object, most: int) -> None:
    """Raises UserError unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(
            f"{name} is {shortened(repr(value), 40)}", hint=f"give a whole number from 1 to {most}"
        )


def _model(model: Model | Backbone | str | os.PathLike[str]) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load(model)
    if not callable(model):
        raise UserError(
            f"this is no model: {shortened(repr(model), 80)}", hint="give what `load` returns, or its folder"
        )
    return Model(model)


def _loaded(file: str | os.PathLike[str], overrides: Sequence[str], *, needs_data: bool) -> LoadedPipeline:
    from orchestrator.pipeline.load import load as read

    if not all(isinstance(override, str) for override in overrides):
        raise UserError("an override is a text", hint='give "key.path=value", such as "seed=1"')
    return read(_path(file), overrides, needs_data=needs_data, gather=True)


def _choice(only: Sequence[str], first: str | None, last: str | None, force: Sequence[str]) -> Choice:
    from orchestrator.pipeline.plan import Choice

    for what, name in (("first", first), ("last", last)):
        if name is not None:
            _names(what, [name])
    return Choice(_names("only", only), first, last, _names("force", force))


def _names(what: str, given: object) -> tuple[str, ...]:
    """Names of stages: one text, or a list or tuple of them."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"`{what}` is no name of a stage: {shortened(repr(given), 100)}")
    return tuple(names)
