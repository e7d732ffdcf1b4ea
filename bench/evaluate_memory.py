"""Evaluating 100,000 pictures takes the memory that 1,000 take, and so does embedding them.

The arms are the peak memory of all processes together in MiB, by the number of pictures: `evaluate` with the k-NN
table, the metrics `knn` and `linear_probe`, its baselines and two models, in one process or with `--workers` of a Ray
cluster, and `orchestrator embed`. What counts is what the system cannot take away from the processes: their own pages
and shared memory, as the kernel divides them (PSS). Pages of files, which it drops where it needs the room, are in the
notes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import psutil

from bench._evaluate_pictures import LABELS, MODEL, SIDE, model, name_of
from bench.harness import Claim, cpu_seconds, summarize
from orchestrator.data.rng import generator

_SIZES, _QUICK_SIZES = (1_000, 10_000, 100_000), (1_000, 3_000)
_INTERVAL_S = 0.25
_GOAL = 1.25


def run(quick: bool, workers: int = 0) -> Claim:
    """A process for each size and command; 1,000 and 3,000 pictures in the quick run."""
    sizes = _QUICK_SIZES if quick else _SIZES
    peaks: dict[str, list[float]] = {}
    files: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model(root / "model")
        for count in sizes:
            pictures = root / f"pictures-{count}"
            _make(pictures, count)
            out = root / f"out-{count}"
            commands = {
                "evaluate": ["-m", "bench._evaluate_pictures", str(pictures), str(count), str(out), str(workers)],
                "embed": [
                    "-m", "orchestrator", "embed", str(pictures), "-m", str(root / "model"), "-o", f"{out}.parquet",
                ],
            }  # fmt: skip
            for name, command in commands.items():
                before = cpu_seconds()
                own, mapped = _peak(command, root / "cache")
                peaks.setdefault(name, []).append(own)
                files.append(
                    f"{name} of {count:,}: {mapped:,.0f} MiB of files, {cpu_seconds() - before:.0f} CPU s"
                )
                sys.stderr.write(f"{name}, {count:,} pictures: {own:,.0f} MiB; {files[-1]}\n")
    arms = {
        f"{name}, {count:,}": summarize([found])
        for name, of in peaks.items()
        for count, found in zip(sizes, of, strict=True)
    }
    return Claim(
        claim=f"peak memory of evaluating {sizes[-1]:,} pictures, over that of {sizes[0]:,}",
        figure=peaks["evaluate"][-1] / peaks["evaluate"][0],
        unit="of 1",
        goal=_GOAL,
        limit=1.0,
        arms=arms,
        notes=(
            f"arms are MiB; made pictures of {SIDE} px with {LABELS} labels, {MODEL}, {workers or 'no'} workers",
            f"embed: {peaks['embed'][-1] / peaks['embed'][0]:.2f} of 1",
            "pages of files at their peak: " + "; ".join(files),
        ),
    )


def _make(folder: Path, count: int) -> None:
    """Noise on a ground whose colour says the label; no two are the same."""
    rng = generator(0, "bench evaluate_memory")
    for at in range(count):
        label = at % LABELS
        pixels = rng.integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[..., label % 3] += np.uint8(5 * label)
        path = folder / name_of(at)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])


def _peak(command: Sequence[str], cache: Path) -> tuple[float, float]:
    """MiB at the peak of a Python command and of all that it starts: its own and shared memory, and pages of files."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ORCHESTRATOR_CACHE": str(cache)}
    most, mapped, done = 0.0, 0.0, threading.Event()
    with subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL) as process:

        def sample() -> None:
            nonlocal most, mapped
            while not done.wait(_INTERVAL_S):
                own, of_files = _memory(process.pid)
                most, mapped = max(most, own), max(mapped, of_files)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        code = process.wait()
        done.set()
        thread.join()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    return most, mapped


def _memory(pid: int) -> tuple[float, float]:
    """MiB that a process and its children share out among them now: own and shared memory, and pages of files."""
    own = of_files = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for each in (parent, *parent.children(recursive=True)):
            # It may end meanwhile.
            with suppress(OSError):
                lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
                kib = {
                    name: int(rest.split()[0])
                    for name, _, rest in (line.partition(":") for line in lines[1:])
                }
                own += kib["Pss_Anon"] + kib["Pss_Shmem"]
                of_files += kib["Pss_File"]
    return own / 2**10, of_files / 2**10
