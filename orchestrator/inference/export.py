"""`pull --format`: a published model in another library's format, kept only if that library gives the same outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator import disk
from orchestrator.config.pixels import PixelFormat
from orchestrator.errors import UserError, first_line, nearest, shortened
from orchestrator.fsio import move
from orchestrator.models.export import FORMATS, Preprocessing, fitting, missing, write
from orchestrator.models.export.formats import loader_text, misfit
from orchestrator.tracking.download import Pulled, fetch, free

if TYPE_CHECKING:
    from orchestrator.models import Backbone
    from orchestrator.models.export.check import Difference

_DISTRIBUTION = "dinov3-orchestrator"
_CARD = "README.md"
# Where a folder does not say what it was trained for: as many patches as those of the published towers at 224 pixels.
_CELLS = 14


@dataclass(frozen=True)
class Exported:
    """What was pulled, how far its outputs are from ours, by size, and what of it the format does not hold."""

    pulled: Pulled
    library: str
    differences: tuple[Difference, ...]
    left_out: str | None = None


def pull_as(name: str, reference: str, out: Path, uri: str, store: str | None = None) -> Exported:
    """Downloads a model and writes it in another format into the folder `out`.

    The folder appears only when the format's library has loaded it in a fresh process, and its outputs at several
    sizes differ from ours by at most 1e-4.

    Args:
        name: of the format: a key of `orchestrator.models.export.FORMATS`.
        reference, out, uri, store: see :func:`orchestrator.tracking.download.fetch`.

    Raises:
        UserError: as `fetch`; no such format, a package that it needs is not installed, it cannot express the model,
            its library cannot load what was written, or the outputs differ.
    """
    _require(name)
    out = free(out).absolute()
    with disk.making(out) as staging:
        pulled = fetch(reference, staging / "pulled", uri, store)
        model, preprocessing = _opened(pulled, name)
        made = staging / "made"
        made.mkdir()
        differences = _made(pulled, name, model, preprocessing, made)
        card = pulled.folder / _CARD
        left_out = _left_out(pulled.folder)
        text = readme(pulled, name, model, preprocessing, differences)
        if left_out is not None:
            text += f"\nThe folder has features alone: {left_out}.\n"
        if card.is_file():
            text += f"\n---\n\n{card.read_text(encoding='utf-8')}"
        (made / _CARD).write_text(text, encoding="utf-8")
        for path in made.iterdir():
            path.chmod(0o644)
        move(made, out)
    return Exported(replace(pulled, folder=out), FORMATS[name].library, tuple(differences), left_out)


def _left_out(folder: Path) -> str | None:
    """What a folder has beside its backbone: the head of a fine-tuned model, which no other library makes."""
    if not (folder / "head.safetensors").is_file():
        return None
    extra = _record(folder).get("extra")
    head = extra.get("head") if isinstance(extra, dict) else None
    task = head.get("type") if isinstance(head, dict) else None
    what = f"the head for {task}" if isinstance(task, str) and task.isidentifier() else "the head"
    return f"{what} is left out, and `orchestrator pull` without --format has it"


def _require(name: str) -> None:
    if name not in FORMATS:
        near = nearest(name, FORMATS)
        raise UserError(
            f"there is no format {name!r}",
            where="--format",
            hint=f"did you mean {near}?" if near else f"there are: safetensors, {', '.join(FORMATS)}",
        )
    absent = missing(name)
    if absent:
        *others, last = absent
        named = f"{', '.join(others)} and {last}" if others else last
        raise UserError(
            f"{named} {'is' if len(absent) == 1 else 'are'} not installed, and --format {name} needs "
            f"{'it' if len(absent) == 1 else 'them'}",
            where="--format",
            hint=f"pip install '{_DISTRIBUTION}[{FORMATS[name].extra}]' torch=={_torch_version()}: pip "
            "may replace torch if its version is not named",
        )


def _torch_version() -> str:
    """Of the torch that is installed, without the build that may follow a plus."""
    return version("torch").partition("+")[0]


def _opened(pulled: Pulled, name: str) -> tuple[Backbone, Preprocessing]:
    """The tower of a pulled folder, in fp32, and what it takes."""
    from orchestrator.models import load_pretrained
    from orchestrator.models.pixels import stats_of

    record = _record(pulled.folder)
    if "output_dim" in record:
        raise _cannot(pulled, name, "it is a text-aligned model, of two towers and a tokenizer", [])
    try:
        model = load_pretrained(pulled.folder).float()
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise _cannot(
            pulled, name, f"it is not a backbone that can be loaded here: {first_line(error)}", []
        ) from error
    reason = misfit(model.config, name)
    if reason is not None:
        raise _cannot(pulled, name, reason, fitting(model.config))
    size = (record.get("extra") or {}).get("image_size")
    patch = model.patch_size
    cells = round(size / patch) if isinstance(size, int) else _CELLS
    mean, std = stats_of(model)
    try:
        pixels = pixels_of(record)
    except ValidationError as error:
        reason = f"`pixels` of its config.json is not valid: {first_line(error)}"
        raise _cannot(pulled, name, reason, []) from error
    return model, Preprocessing(max(1, cells) * patch, mean, std, pixels)


def pixels_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """What a config.json says of the values of files, as it is copied into exported folders; None where it is nothing.

    Raises:
        ValidationError: it is something else.
    """
    told = record.get("pixels")
    return (
        None if told is None else PixelFormat.model_validate(told).model_dump(mode="json", exclude_none=True)
    )


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _cannot(pulled: Pulled, name: str, reason: str, formats: Sequence[str]) -> UserError:
    can = ", ".join(["safetensors", *formats])
    return UserError(
        f"{pulled} cannot be written as {name}: {shortened(reason, 300)}",
        where="--format",
        hint=f"use a format that can: {can}",
    )


def _made(
    pulled: Pulled, name: str, model: Backbone, preprocessing: Preprocessing, folder: Path
) -> list[Difference]:
    """Writes the format into an empty folder, and compares what its library loads from there."""
    from orchestrator.models.export.check import LIMIT, ReloadError, compare

    library = FORMATS[name].library
    others = [other for other in fitting(model.config) if other != name]
    try:
        write(model, name, preprocessing, folder)
    except OSError:
        raise
    except Exception as error:  # of the exporters, which say nowhere what they raise
        raise _cannot(pulled, name, f"{type(error).__name__}: {first_line(error)}", others) from error
    try:
        differences = compare(model, folder, preprocessing.size)
    except ReloadError as error:
        if error.step == "import":
            raise UserError(
                f"{library} cannot be imported: {shortened(str(error), 300)}",
                where="--format",
                hint="install a torchvision that fits torch"
                if "torchvision" in str(error)
                else f"pip install --upgrade '{_DISTRIBUTION}[{FORMATS[name].extra}]'",
            ) from error
        raise _cannot(pulled, name, f"{library} does not {error.step} it: {error}", others) from error
    worst = max(differences, key=lambda one: (not one.is_small, one.value))
    if not worst.is_small:
        reason = (
            f"{library} gives other outputs than this package: "
            f"the largest difference is {worst}, above {LIMIT:.0e}"
        )
        raise _cannot(pulled, name, reason, others)
    return differences


def readme(
    pulled: Pulled,
    name: str,
    model: Backbone,
    preprocessing: Preprocessing,
    differences: Sequence[Difference],
) -> str:
    """How to load the folder, and what was compared, in Markdown."""
    chosen = FORMATS[name]
    rows = "\n".join(f"| {one.batch} × {one.height} × {one.width} | {one.value:.1e} |" for one in differences)
    return _README.format(
        name=pulled.name,
        version=pulled.version,
        library=chosen.library,
        code=loader_text(name),
        side=preprocessing.size,
        mean=", ".join(map(str, preprocessing.mean)),
        std=", ".join(map(str, preprocessing.std)),
        patch=model.patch_size,
        note=chosen.note,
        rows=rows,
        channels=len(preprocessing.mean),
        seen=_seen(preprocessing),
    )


def _seen(preprocessing: Preprocessing) -> str:
    """What the channels are, before the mean is subtracted."""
    pixels = preprocessing.pixels or {}
    if not pixels:
        return "RGB in 0 to 1"
    bands, levels = pixels.get("bands"), pixels.get("range")
    of = f"bands {bands} of a file, counted from 0," if bands else "RGB"
    scale = f"from {levels[0]:g} to {levels[1]:g} as 0 to 1" if levels else "in 0 to 1"
    more = "" if preprocessing.is_rgb else " (`preprocess_bands.py` does it)"
    return f"{of} {scale}{more}"


_README = """# {name} version {version}, for {library}

`load.py` loads this folder without the package that trained the model:

```python
{code}```

{note}

Images are float32 (B, {channels}, H, W): {seen}, minus {mean}, divided by {std}. H and W are multiples of {patch}. The
model was trained at {side} × {side}.

## Compared with the model that was published

`load.py` was run in a fresh process on fixed images. The largest absolute difference of an output:

| images × height × width | difference |
|---|--:|
{rows}
"""
