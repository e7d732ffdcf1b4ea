"""k-means takes less processor time than faiss for clusters of the same inertia, and little memory from a file."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from bench.harness import Arm, Claim, UnfairError, cpu_seconds, interleave, summarize
from orchestrator.data.curation.block_workers import ThreadWorkers
from orchestrator.data.curation.kmeans import Clusters, fit
from orchestrator.data.curation.vectors import ArrayVectors

Floats = NDArray[np.float32]

# Vectors, their numbers, clusters; how often; the goal, as a share of the peer's processor time.
SIZES = ((50_000, 384, 1000, 3, 1.0), (200_000, 384, 4000, 1, 0.7))
QUICK = ((12_000, 64, 150, 3, 1.0),)
ON_DISK, QUICK_ON_DISK = (1_000_000, 256, 10_000), (60_000, 256, 300)
# Of the vectors' bytes.
MEMORY = 0.25
_PASSES = 25


def run(quick: bool, on_disk: bool = True) -> Claim:
    """Both arms with one thread; ours once with its own settings and once stopped at the other's inertia.

    Args:
        quick: a few seconds.
        on_disk: whether to cluster a file, too, which takes minutes.
    """
    arms: dict[str, Arm] = {}
    notes = [f"{_peer()} takes {_PASSES} passes from random vectors; its own limits on the sample are lifted"]
    worst = 0.0
    for total, dim, clusters, repetitions, goal in QUICK if quick else SIZES:
        name = f"{total:,} x {dim} -> {clusters:,}"
        found, ratio = _compare(made_vectors(total, dim), clusters, repetitions, name, notes)
        arms |= found
        notes.append(f"{name}: {ratio:.2f} of {_peer()}'s processor time; the goal is {goal}")
        worst = max(worst, ratio / goal)
    if on_disk:
        share, line = _from_disk(*(QUICK_ON_DISK if quick else ON_DISK))
        arms["from a file: memory / data"] = summarize([share])
        notes.append(line)
        worst = worst if quick else max(worst, share / MEMORY)
    notes.append(
        "vectors: 24 numbers around 200 centres of Zipf's sizes, through two layers with tanh, noise, length 1"
    )
    claim = (
        f"processor seconds at {_peer()}'s inertia ÷ its own, and memory ÷ vectors, as shares of their goals"
    )
    return Claim(claim, worst, "of the goal", 1.0, None, arms, notes)


def made_vectors(total: int, dim: int, seed: int = 0) -> Floats:
    """What embeddings look like: heaps of very unequal sizes on a curved surface of few dimensions, (total, dim)."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, 201)
    centres = 1.5 * rng.standard_normal((200, 24), dtype=np.float32)
    first = rng.standard_normal((24, 96), dtype=np.float32) / 5
    second = rng.standard_normal((96, dim), dtype=np.float32) / 10
    found = np.empty((total, dim), np.float32)
    for start in range(0, total, 65536):
        count = min(65536, total - start)
        inner = 0.6 * rng.standard_normal((count, 24), dtype=np.float32)
        inner += centres[rng.choice(200, count, p=shares / shares.sum())]
        part = np.tanh(inner @ first) @ second + 0.05 * rng.standard_normal((count, dim), dtype=np.float32)
        found[start : start + count] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return found


def _compare(
    vectors_ND: Floats, clusters: int, repetitions: int, name: str, notes: list[str]
) -> tuple[dict[str, Arm], float]:
    """The arms of one size, in processor seconds, and ours at equal inertia ÷ the peer's."""
    inertias: dict[str, list[float]] = {"peer": [], "stopped": []}
    ours = ArrayVectors(vectors_ND)

    def peer() -> float:
        return _timed(lambda: inertias["peer"].append(_PEERS[_peer()](vectors_ND, clusters)))

    first = peer()
    whole: list[Clusters] = []
    default = _timed(lambda: whole.append(fit(ours, clusters, 0, workers=ThreadWorkers(1))))
    history = whole[0].history
    enough = next((number for number, value in enumerate(history) if value <= inertias["peer"][0]), None)
    if enough is None:
        raise UnfairError(f"{name}: inertia {history[-1]:.6g}, {_peer()} has {inertias['peer'][0]:.6g}")

    def stopped() -> float:
        return _timed(lambda: inertias["stopped"].append(_stopped(ours, clusters, enough)))

    # The first of each is spent already where there is one only.
    again = interleave({"peer": peer, "stopped": stopped}, repetitions) if repetitions > 1 else {}
    peer_arm = again.get("peer") or summarize([first])
    stopped_arm = again.get("stopped") or summarize([stopped()])
    if max(inertias["stopped"]) > inertias["peer"][0]:
        raise UnfairError(f"{name}: {inertias}")
    notes.append(
        f"{name}: inertia {inertias['peer'][0]:.6g} of {_peer()}; ours {inertias['stopped'][0]:.6g} when stopped after "
        f"{enough} of {len(history) - 1} passes, {whole[0].inertia:.6g} else"
    )
    arms = {
        f"{name}, {_peer()}": peer_arm,
        f"{name}, ours at its inertia": stopped_arm,
        f"{name}, ours": summarize([default]),
    }
    return arms, stopped_arm.median / peer_arm.median


def _stopped(vectors: ArrayVectors, clusters: int, passes: int) -> float:
    return fit(vectors, clusters, 0, workers=ThreadWorkers(1), iterations=passes).inertia


def _timed(work: Callable[[], object]) -> float:
    before = cpu_seconds()
    with threadpool_limits(1):
        work()
    return cpu_seconds() - before


def _peer() -> str:
    return "faiss" if importlib.util.find_spec("faiss") else "scikit-learn"


def _faiss(vectors_ND: Floats, clusters: int) -> float:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    found = faiss.Kmeans(
        vectors_ND.shape[1], clusters, niter=_PASSES, seed=1,
        min_points_per_centroid=1, max_points_per_centroid=len(vectors_ND),
    )  # fmt: skip
    found.train(vectors_ND)
    return float(found.obj[-1])


def _scikit_learn(vectors_ND: Floats, clusters: int) -> float:
    from sklearn.cluster import KMeans

    found = KMeans(clusters, init="random", n_init=1, max_iter=_PASSES, tol=0, random_state=1).fit(vectors_ND)
    return float(found.inertia_)


_PEERS = {"faiss": _faiss, "scikit-learn": _scikit_learn}

# In a process of its own, so that nothing else counts as its memory; NumPy is there already when it begins.
_CHILD = """
import json, pathlib, re, sys, time
from orchestrator.data.curation.kmeans import fit
from orchestrator.data.curation.vectors import open_vectors
from orchestrator.data.curation.block_workers import ThreadWorkers
import numpy as np
np.ones((64, 64), np.float32) @ np.ones((64, 64), np.float32)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
before, began = peak(), time.process_time()
found = fit(open_vectors(pathlib.Path(sys.argv[1])), int(sys.argv[2]), 0,
            iterations=int(sys.argv[3]), workers=ThreadWorkers(2))
print(json.dumps([peak() - before, time.process_time() - began, list(found.history)]))
"""


def _from_disk(total: int, dim: int, clusters: int, passes: int = 3) -> tuple[float, str]:
    """Peak memory ÷ the vectors' bytes, and a line about it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        np.save(path, made_vectors(total, dim))
        command = [sys.executable, "-c", _CHILD, str(path), str(clusters), str(passes)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, seconds, history = json.loads(said)
    data = 4 * total * dim
    line = (
        f"from a file, {total:,} x {dim} -> {clusters:,}, 2 threads: {peak / 2**20:.0f} MiB more than before, "
        f"{peak / data:.1%} of the data; {seconds:.0f} processor seconds for "
        f"{len(history)} passes, inertia {history[0]:.6g} to {history[-1]:.6g}"
    )
    return peak / data, line
