"""Curation takes processor time and memory that grow no faster than its photos, and the index few bytes a photo."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from bench.harness import Arm, Claim, UnfairError, summarize

SIZES, QUICK = (1_000, 5_000, 20_000), (100, 300, 900)
# Photos that are added for the second curation, as a share.
ADDED = 0.01
# What memory at 100,000 photos may be by the slope of what was measured, and an index a row, in bytes.
_MOST_MEMORY, _AT, _MOST_ROW = 2e9, 100_000, 120
_GOAL = 1.1
_SIDE = 160


def run(quick: bool) -> Claim:
    """Each size in a process of its own, once: a first curation, and one with a hundredth of new photos.

    The figure is the exponent of the processor time from the middle size to the largest: 1 is linear.
    """
    sizes = QUICK if quick else SIZES
    arms: dict[str, Arm] = {}
    notes = [
        f"photos: crops of two real photographs, moved, mirrored, brightened, as JPEGs of {_SIDE} pixels; thumbnails, "
        "clusters [100, 10]",
        "arms are processor seconds; memory is the process's peak above what it had before",
    ]
    found = {}
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found[count] = _measured(Path(folder), count)
        for name, what in (("first", "seconds"), ("with 1 % new photos", "again_seconds")):
            arms[f"{count:,} photos, {name}"] = summarize([found[count][what]])
        one = found[count]
        notes.append(
            f"{count:,}: {one['unique']:,.0f} kept, {one['memory'] / 1e6:.0f} MB, index {one['row']:.0f} bytes a row, "
            f"{one['decoded']:,} decoded at first and {one['again_decoded']:,} then, "
            "with those of the picture of clusters"
        )
    middle, largest = sizes[-2:]
    exponent = _exponent(found[middle]["seconds"], found[largest]["seconds"], largest / middle)
    slope = (found[largest]["memory"] - found[middle]["memory"]) / (largest - middle)
    there = found[largest]["memory"] + slope * (_AT - largest)
    notes.append(
        f"memory: {slope:.0f} bytes a photo, so {there / 1e9:.2f} GB at {_AT:,} photos; the goal is "
        f"{_MOST_MEMORY / 1e9:g}"
    )
    notes.append(
        f"index: {found[largest]['row']:.0f} bytes a row of the {_MOST_ROW} that are the goal, so "
        f"{1.7e9 * found[largest]['row'] / 1e9:.0f} GB at 1.7 billion rows, once a machine"
    )
    claim = f"exponent of the processor time of a curation from {middle:,} to {largest:,} photos"
    return Claim(claim, exponent, "exponent", _GOAL, None, arms, notes)


def _exponent(before: float, after: float, ratio: float) -> float:
    return math.log(after / before) / math.log(ratio)


def make_photos(folder: Path, start: int, stop: int) -> None:
    """Photos of these numbers, each the same whenever it is made."""
    from sklearn.datasets import load_sample_images

    wholes = [Image.fromarray(one) for one in load_sample_images().images]
    folder.mkdir(exist_ok=True)
    for number in range(start, stop):
        rng = np.random.default_rng(number)
        whole = wholes[number % len(wholes)]
        width = int(rng.integers(80, whole.width // 2))
        height = int(width * rng.uniform(0.7, 1.0))
        left, top = rng.integers(0, whole.width - width), rng.integers(0, whole.height - height)
        crop = whole.crop((int(left), int(top), int(left) + width, int(top) + height))
        crop = crop.resize((_SIDE, max(1, _SIDE * height // width)))
        if rng.integers(2):
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ImageEnhance.Brightness(crop).enhance(float(rng.uniform(0.6, 1.4))).save(
            folder / f"{number:07}.jpg", quality=85
        )


# In a process of its own, so that nothing else counts as its memory; libraries are there before it begins.
_CHILD = """
import json, os, pathlib, re, sys, time
import numpy as np
from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.data import decode, index_table
from orchestrator.data.curation import contact_sheet, selection
from orchestrator.data.index import ImageIndex
from orchestrator.data.sources import digests
from orchestrator.data.sources.folder import fingerprint
from orchestrator.stages.base import Context
from orchestrator.stages.curate.config import Curate
from orchestrator.tracking.run import NullRun
from bench.curate_scale import make_photos

place, count, more = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
digests._RACY_NS = 0
plain, decoded = decode._decode, []
def counting(*given):
    decoded.append(1)
    return plain(*given)
decode._decode = counting
np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
def curate(name):
    source = DataSource(path=place / "photos")
    decoded.clear()
    (place / name / "out").mkdir(parents=True)
    began = time.process_time()
    fingerprint(source)
    stage = Curate(kind="curate", data="photos", clusters=[100, 10] if count >= 1000 else [10, 3])
    figures = stage.run(Context(
        name="curate", pipeline="bench", seed=0, key="k", inputs={}, keys={}, sources={"photos": source},
        out=place / name / "out", work=place / name / "work", elastic=Elastic(), run=NullRun()))
    return time.process_time() - began, len(decoded), figures
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
seconds, first, figures = curate("one")
memory = peak() - before
make_photos(place / "photos", count, count + more)
again_seconds, again, _ = curate("two")
index_table.MAPPED_FROM = 0
index = ImageIndex.load(place / "two" / "out")
print(json.dumps(dict(seconds=seconds, memory=memory, again_seconds=again_seconds, decoded=first, again_decoded=again,
    row=index.num_bytes / len(index), images=figures["images"], unique=figures["unique"])))
"""


def _measured(place: Path, count: int) -> dict[str, Any]:
    make_photos(place / "photos", 0, count)
    more = max(1, round(ADDED * count))
    command = [sys.executable, "-c", _CHILD, str(place), str(count), str(more)]
    environment = {"ORCHESTRATOR_CACHE": str(place / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        raise UnfairError(f"curation of {count} photos ended: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["images"] != count:
        raise UnfairError(f"{found['images']} of {count} photos were found")
    return found
