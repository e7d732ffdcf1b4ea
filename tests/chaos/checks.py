"""What must hold after a storm: the same model, a complete ledger and records, and nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors

from chaos import recipe
from chaos.runs import Run
from chaos.scene import BUCKET, Scene, marked

# Of a sum of float64 numbers in any order; weights, moments and EMA are the same to the last bit (`elastic.exact`).
LOSS = 1e-12
_GONE_S = 30.0
_SHM = Path("/dev/shm")


class Objects:
    """What really is in the bucket below a run's prefix, seen past the proxy."""

    def __init__(self, scene: Scene, run: Run) -> None:
        self._client = scene.client()
        self._prefix = f"{run.folder.name}/"

    def names(self, below: str = "") -> list[str]:
        """Objects whose name starts with `below`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self._prefix + below
        )
        return sorted(
            item["Key"].removeprefix(self._prefix)
            for page in pages
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")
        )

    def get(self, name: str) -> bytes:
        """One object."""
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=self._prefix + name)["Body"].read()
        return data

    def uploads(self) -> list[str]:
        """Multipart uploads that were never ended."""
        reply = self._client.list_multipart_uploads(Bucket=BUCKET, Prefix=self._prefix)
        return [upload["Key"] for upload in reply.get("Uploads", ())]


def same_model(calm: Objects, storm: Objects, job: str) -> tuple[float, list[str]]:
    """The largest relative difference of losses, and what is wrong."""
    (figures, weights), (moved, moved_weights) = _outcome(calm, job), _outcome(storm, job)
    wrong = []
    if figures.keys() != moved.keys():
        return np.inf, [f"{job}: {len(moved)} steps instead of {len(figures)}"]
    orders = [step for step in figures if figures[step]["sample_order"] != moved[step]["sample_order"]]
    loss = max(abs(moved[step]["loss"] / figures[step]["loss"] - 1) for step in figures)
    others = [
        name for name in weights | moved_weights if not _equal(weights.get(name), moved_weights.get(name))
    ]
    wrong += [f"{job}: other samples at steps {orders}"] if orders else []
    wrong += [f"{job}: losses differ by {loss:.1e}"] if not loss <= LOSS else []
    wrong += (
        [f"{job}: {len(others)} tensors of {len(weights)} differ, among them {others[0]}"] if others else []
    )
    return loss, wrong


def _equal(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    return one is not None and other is not None and np.array_equal(one, other)


def _outcome(objects: Objects, job: str) -> tuple[dict[int, dict[str, float]], dict[str, NDArray[Any]]]:
    stage, _, student = job.partition("/")
    names = objects.names(f"artifacts/{stage}-")
    if student:
        (said,) = [name for name in names if name.endswith(f"/students/{student}/artifact.json")]
        names = objects.names(f"artifacts/student-{json.loads(objects.get(said))['key'][:16]}")
    (manifest,) = [name for name in names if name.endswith("/checkpoint/checkpoint.json")]
    base = manifest.removesuffix("checkpoint/checkpoint.json")
    parts: dict[str, list[NDArray[Any]]] = {}
    for file in sorted(json.loads(objects.get(manifest))["files"]):
        for key, value in load_tensors(objects.get(f"{base}checkpoint/{file}")).items():
            parts.setdefault(key, []).append(value)
    history = json.loads(objects.get(f"{base}history.json"))
    figures = {record["step"]: record["metrics"] for record in history}
    return figures, {key: np.concatenate(values) for key, values in parts.items()}


def artifacts(objects: Objects) -> list[str]:
    """Every folder has its manifest, every file of a manifest is there and as it should be, and nothing else is."""
    wrong = []
    names = set(objects.names("artifacts/"))
    for folder in sorted({"/".join(name.split("/")[:2]) for name in names}):
        if f"{folder}/manifest.json" not in names:
            wrong.append(f"{folder} has no manifest")
            continue
        files = json.loads(objects.get(f"{folder}/manifest.json"))["files"]
        there = {name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")}
        there.remove("manifest.json")
        if there != files.keys():
            wrong.append(f"{folder}: the files differ from the manifest's: {sorted(there ^ files.keys())}")
            continue
        for name, entry in files.items():
            data = objects.get(f"{folder}/{name}")
            if (len(data), hashlib.sha256(data).hexdigest()) != (entry["size"], entry["sha256"]):
                wrong.append(f"{folder}/{name} is damaged")
    for name in sorted(names):
        if name.endswith("/checkpoint/checkpoint.json"):
            folder = name.removesuffix("checkpoint.json")
            listed = {f"{folder}{file}" for file in json.loads(objects.get(name))["files"]}
            there = {one for one in names if one.startswith(folder) and one != name}
            wrong += [f"{one} is not part of its checkpoint" for one in sorted(there ^ listed)]
    return wrong


def checkpoints(objects: Objects) -> tuple[int, list[str]]:
    """How many checkpoints can be seen now, and which of them are not whole. Training may go on meanwhile."""
    seen, wrong = 0, []
    for name in objects.names("work/"):
        if not name.endswith("/checkpoint.json"):
            continue
        folder = name.removesuffix("/checkpoint.json")
        # Pruning takes the manifest first: what is lacking counts only while the same manifest is still there.
        manifest = _maybe(objects, name)
        broken = [
            f"{folder}/{file}"
            for file, entry in json.loads(manifest or b'{"files": {}}')["files"].items()
            if hashlib.sha256(_maybe(objects, f"{folder}/{file}") or b"").hexdigest() != entry["sha256"]
        ]
        if manifest is not None and _maybe(objects, name) == manifest:
            seen += 1
            wrong += [f"a checkpoint is there, but not whole: {one}" for one in broken]
    return seen, wrong


def _maybe(objects: Objects, name: str) -> bytes | None:
    try:
        return objects.get(name)
    except objects._client.exceptions.NoSuchKey:
        return None


def ledger(objects: Objects, pipeline: dict[str, Any], starts: int) -> tuple[dict[str, int], list[str]]:
    """Every stage done, every attempt ended by something, no event missing or twice, none failed.

    Read here from the objects themselves: <number>-<epoch>.json.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for name in objects.names("ledger/"):
        number, _, epoch = name.rpartition("/")[2].removesuffix(".json").partition("-")
        found[int(number), int(epoch or 0)] = json.loads(objects.get(name))
    events, epoch = [], 0
    for key in sorted(found, key=lambda key: (key[0], -key[1])):
        if key[1] >= epoch:
            epoch = key[1]
            events.append((key[0], found[key]))
    wrong = []
    numbers = [number for number, _ in events]
    if numbers != list(range(len(numbers))):
        wrong.append(f"ledger: its events are numbered {numbers}")
    happened = [event for _, event in events]
    wrong += [
        f"ledger: {event['stage']} failed: {event.get('error')}"
        for event in happened
        if event["event"] == "failed"
    ]
    running: str | None = None
    for event in happened:
        name = event["event"]
        if name == "running":
            wrong += [f"ledger: {event['stage']} started while {running} was running"] if running else []
            running = event["stage"]
        elif name in ("done", "failed", "stopped", "opened"):
            # A driver that opens the pipeline again is how the end of a killed one shows.
            running = None
    opened = sum(event["event"] == "opened" for event in happened)
    done = Counter(event["stage"] for event in happened if event["event"] == "done")
    wrong += [f"ledger: {stage} done {done[stage]} times" for stage in pipeline["stages"] if done[stage] != 1]
    if opened > starts:
        wrong.append(f"ledger: opened {opened} times by {starts} drivers")
    if (happened[-1]["event"], happened[-1].get("status")) != ("closed", "FINISHED"):
        wrong.append(f"ledger: ends with {happened[-1]}")
    counts = {"events": len(events), "void": len(found) - len(events), "opened": opened}
    return counts, wrong


def tracking(scene: Scene, run: Run) -> tuple[dict[str, int], list[str]]:
    """No run is RUNNING, none is there twice, and every step of every job is there once."""
    with contextlib.closing(sqlite3.connect(f"file:{scene.tracking.database}?mode=ro", uri=True)) as database:

        def ask(question: str, *values: object) -> list[Any]:
            experiment = "experiment_id = (select experiment_id from experiments where name = ?)"
            return database.execute(question.format(experiment), (run.folder.name, *values)).fetchall()

        runs = ask("select name, status from runs where {}")
        wrong = [f"MLflow: run {name} is {status}" for name, status in runs if status != "FINISHED"]
        jobs = recipe.jobs(run.pipeline)
        expected = Counter(["storm", *run.pipeline["stages"], *(job for job in jobs if "/" in job)])
        if Counter(name for name, _ in runs) != expected:
            wrong.append(f"MLflow: its runs are {sorted(name for name, _ in runs)}")
        for job in jobs:
            joined = "select step from metrics join runs using (run_uuid)"
            steps = sorted(s for (s,) in ask(joined + " where {} and name = ? and key = 'train/loss'", job))
            last = run.pipeline["stages"][job.partition("/")[0]]["steps"]
            if steps != list(range(1, last + 1)):
                twice = sorted(step for step, count in Counter(steps).items() if count > 1)
                lacking = sorted(set(range(1, last + 1)) - set(steps))
                wrong.append(f"MLflow: {job} has steps {twice} twice and lacks {lacking}")
    return {"runs": len(runs)}, wrong


def orphans(mark: str) -> list[str]:
    """Processes of the scene that are left, after some time to end."""
    deadline = time.monotonic() + _GONE_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return [f"process {one.pid} is left: {_title(one)}" for one in left]


def _title(process: Any) -> str:
    with contextlib.suppress(Exception):
        return f"{' '.join(process.cmdline())[:150]} ({process.status()}, child of {process.ppid()})"
    return "gone by now"


def shared_memory() -> set[str]:
    """What is in shared memory under a name now: files of /dev/shm, but for those of tests, and System V segments."""
    tops = (path for path in _SHM.iterdir() if not path.name.startswith("pytest-of-"))
    names = {str(path) for top in tops for path in (top, *top.rglob("*")) if not path.is_dir()}
    with contextlib.suppress(OSError):
        lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        names |= {f"System V segment {line.split()[1]}" for line in lines}
    return names


def leaked_memory(before: set[str]) -> list[str]:
    """What has come since and is nobody's: others on this machine may be using theirs."""
    new = {name for name in shared_memory() - before if _is_mine(name)}
    held = set(_mapped()) if new else set()
    return [f"shared memory is left: {name}" for name in sorted(new - held)]


def _is_mine(name: str) -> bool:
    with contextlib.suppress(OSError):
        return not name.startswith("/") or Path(name).stat().st_uid == os.getuid()
    return False


def _mapped() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                yield from (str(link.readlink()) for link in (process / "fd").iterdir())
            with contextlib.suppress(OSError):
                lines = (process / "maps").read_text().splitlines()
                yield from (line.split(None, 5)[5] for line in lines if str(_SHM) in line)
