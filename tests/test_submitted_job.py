"""`ray job submit -- orchestrator run …` against a head with its job server, and a worker that shares no files with it.

The worker's raylet runs in a mount namespace of its own, in which this checkout, the driver's folders and Ray's
temporary folder are empty. The project comes to it with the job (`py_modules`), checkpoints and artifacts through
S3, and the photographs are fetched from the bucket when the machine starts, as a cluster's setup commands do.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import yaml
from ports import free_port
from s3_server import S3Server

import orchestrator

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PATIENCE_S = 180.0
PIPELINE = {
    "name": "submitted",
    "cluster": {"address": "auto"},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 4, "sample": 0.4},
        "pretrain": {
            "kind": "pretrain",
            "needs": "curate",
            "model": "vit_femto",
            "steps": 4,
            "batch_size": 16,
            "block_size": 8,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}},
            "ema": {"peak": 0.9},
            "heads": {
                "hidden": 32,
                "dino_bottleneck": 16,
                "dino_prototypes": 64,
                "ibot_bottleneck": 16,
                "ibot_prototypes": 64,
            },
            "elastic": {"workers": 2},
        },
    },
}

# What a new machine does before it joins: `aws s3 sync` in a cluster file.
FETCH = """
import os, pathlib, sys
import boto3
from botocore.config import Config
prefix, target = sys.argv[1], pathlib.Path(sys.argv[2])
client = boto3.client("s3", region_name="us-east-1", config=Config(s3={"addressing_style": "path"}))
pages = client.get_paginator("list_objects_v2").paginate(Bucket="tests", Prefix=prefix)
for item in (item for page in pages for item in page.get("Contents", [])):
    target.mkdir(parents=True, exist_ok=True)
    client.download_file("tests", item["Key"], str(target / item["Key"].rpartition("/")[2]))
"""


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Path]:
    """A folder with a short name: sockets of Ray go below it."""
    folder = Path("/tmp") / f"job-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def started() -> Iterator[Callable[[list[str], Path, dict[str, str]], subprocess.Popen[bytes]]]:
    """Starts processes that end, with all below them, when the test does."""
    with ExitStack() as stack:

        def start(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
            with log.open("wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
            stack.callback(end, process)
            return process

        yield start


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.wait()


def photographs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(24):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(
            str(folder / f"{number:02}.png"), cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC)
        )


def wait_for_job_server(url: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        status = 0
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                status = answer.status
        except urllib.error.HTTPError as refused:
            status = refused.code
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.3)
        if status:
            assert status == 401, "it takes requests without the cluster's token"
            return
    pytest.fail(f"no job server: {log.read_text()[-2000:]}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_job_trains_on_a_machine_that_shares_no_files(
    scene: Path,
    s3: S3Server,
    s3_uri: str,
    started: Callable[[list[str], Path, dict[str, str]], subprocess.Popen[bytes]],
) -> None:
    pytest.importorskip(
        "aiohttp_cors", reason="the job server needs ray[default]: pip install -e .[dashboard]"
    )
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a file system of the worker's own needs the right to make a mount namespace")
    photos, temp, cache = scene / "photos", scene / "ray", scene / "cache"
    photographs(photos)
    prefix = f"{s3_uri.removeprefix('s3://tests/')}-photos/"
    for photo in photos.iterdir():
        s3.client().upload_file(str(photo), "tests", f"{prefix}{photo.name}")
    gcs, http = free_port(), free_port()
    env = {**os.environ, "ORCHESTRATOR_CACHE": str(cache), "RAY_USAGE_STATS_ENABLED": "0"}
    # Who reaches the job server may run anything on the cluster, so it is one with a token.
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env.pop("PYTHONPATH", None)
    env.pop("RAY_ADDRESS", None)
    head = ["start", "--head", f"--port={gcs}", "--num-cpus=0", "--block"]
    head += [f"--temp-dir={temp}", "--dashboard-host=127.0.0.1", f"--dashboard-port={http}"]
    started([*RAY, *head], scene / "head.log", env)
    wait_for_job_server(f"http://127.0.0.1:{http}/api/version", scene / "head.log")

    worker = [*RAY, "start", f"--address=127.0.0.1:{gcs}", "--num-cpus=2"]
    worker += [f"--dashboard-agent-listen-port={free_port()}"]
    started(
        ["unshare", "--mount", "sh", "-euc", _isolated(scene, temp, prefix, photos, [*worker, "--block"])],
        scene / "worker.log",
        env,
    )
    project = scene / "project"
    project.mkdir()
    pipeline = {
        **PIPELINE,
        "store": s3_uri,
        "tracking": {"uri": f"sqlite:///{scene}/mlflow.db"},
        "data": {"photos": {"path": str(photos)}},
    }
    (project / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    submit = ["job", "submit", f"--address=http://127.0.0.1:{http}", f"--working-dir={project}"]
    # A folder and not a wheel: for a wheel Ray has pip install all that it depends on, anew for each job.
    submit += [f"--runtime-env-json={json.dumps({'py_modules': [str(_source())]})}"]
    done = subprocess.run(
        [*RAY, *submit, "--", "orchestrator", "run", "pipeline.yaml"],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr + (scene / "worker.log").read_text()
    assert done.returncode == 0, said
    assert re.search(r"✓ pretrain +done", done.stdout), said
    keys = [item["Key"] for item in _listed(s3, s3_uri)]
    assert [key for key in keys if "/artifacts/pretrain-" in key and key.endswith("/manifest.json")], keys
    assert sorted(p.name for p in photos.iterdir()) == [f"{n:02}.png" for n in range(24)]


def _isolated(scene: Path, temp: Path, prefix: str, photos: Path, command: list[str]) -> str:
    """A shell script that hides the driver's files, fetches the photographs, and becomes the raylet."""
    hidden = [_source(), *(_source().parent / name for name in ("models", "objectives", "stages"))]
    lines = [f"mount -t tmpfs tmpfs {folder}" for folder in [scene, *hidden]]
    fetch = shlex.join([sys.executable, "-c", FETCH, prefix, str(photos)])
    return "\n".join([*lines, f"mkdir {temp}", fetch, f"exec {shlex.join(command)}"])


def _source() -> Path:
    return Path(orchestrator.__file__).parent


def _listed(s3: S3Server, uri: str) -> list[dict[str, str]]:
    pages = (
        s3.client()
        .get_paginator("list_objects_v2")
        .paginate(Bucket="tests", Prefix=uri.removeprefix("s3://tests/"))
    )
    return [item for page in pages for item in page.get("Contents", [])]
