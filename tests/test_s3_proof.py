"""The whole pipeline with everything on S3: a real server, faults in front of it, and a driver's machine that is lost.

`make proofs` runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from faulty_proxy import FaultyProxy
from s3_server import S3Server

from .test_pipeline import PIPELINE, folder

__all__ = ["folder"]
ORCHESTRATOR = [sys.executable, "-m", "orchestrator"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_pipeline_on_s3(
    folder: Path,
    s3: S3Server,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({**PIPELINE, "store": s3_uri}, sort_keys=False))
    client, prefix = s3.client(), s3_uri.removeprefix("s3://tests/")

    def names() -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="tests", Prefix=f"{prefix}/")
        return [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])]

    with FaultyProxy(s3.endpoint, seed=7, rate=0.03) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        log = (folder / "log").open("wb")
        first = subprocess.Popen([*ORCHESTRATOR, "run", "pipeline.yaml"], cwd=folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 400
        while not any("/step-" in name and name.endswith("checkpoint.json") for name in names()):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            assert first.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        first.send_signal(signal.SIGKILL)
        first.wait()
        # The machine is gone, and with it its cache: all that matters is in the store.
        shutil.rmtree(os.environ["ORCHESTRATOR_CACHE"])
        done = subprocess.run(
            [*ORCHESTRATOR, "run", "pipeline.yaml"], cwd=folder, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "was interrupted" in done.stdout
    found = names()
    assert not [name for name in found if name.startswith("work/")], "finished work is cleared away"
    assert [name for name in found if name.startswith("mlartifacts/")], "MLflow's artifacts are there too"
    manifests = [name for name in found if name.startswith("artifacts/") and name.endswith("/manifest.json")]
    students = [name for name in manifests if name.startswith("artifacts/student-")]
    assert len(students) == len(PIPELINE["stages"]["distill"]["students"])
    assert len(manifests) - len(students) == len(PIPELINE["stages"])
    for name in manifests:
        body = json.loads(client.get_object(Bucket="tests", Key=f"{prefix}/{name}")["Body"].read())
        base = name.removesuffix("manifest.json")
        inside = {other.removeprefix(base) for other in found if other.startswith(base)} - {"manifest.json"}
        assert inside == set(body["files"]), name
    (history,) = [
        name for name in found if name.startswith("artifacts/pretrain-") and name.endswith("history.json")
    ]
    records = json.loads(client.get_object(Bucket="tests", Key=f"{prefix}/{history}")["Body"].read())
    assert sorted(record["step"] for record in records) == list(range(1, 31))
    said = (folder / "log").read_text() + done.stdout + done.stderr
    assert s3.secret_key not in said
