"""`cluster: {dashboard: true}`: Ray's dashboard, its state of Ray Train's runs, and metrics for Prometheus."""

from __future__ import annotations

import builtins
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from running import Running
from tiny import tiny_job


def test_it_lists_the_run_and_exports_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_enable_metrics_collection", "1")  # put back what `start` sets for good
    with cluster.start(Cluster(dashboard=True), prestart=1) as own:
        assert isinstance(own, cluster.OwnCluster)
        assert own.dashboard_url.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{own.dashboard_url}/api/train/v2/runs/v1", timeout=10)
        hold = tmp_path / "shown-faults" / "hold-5"
        job = tiny_job(tmp_path / "shown", 10, 1)
        hold.touch()
        running = Running(job)
        running.wait(lambda: running.step() >= 5)
        (run,) = get(own, "/api/train/v2/runs/v1")["train_runs"]
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 30
        while 'ray_train_run_name="shown"' not in (text := metrics(port)):
            assert time.monotonic() < deadline, text[-2000:]
            time.sleep(0.5)
        hold.unlink()
        running.finish()
    assert (run["name"], run["status"]) == ("shown", "RUNNING")
    assert run["run_settings"]["scaling_config"]["num_workers"] == [1, 1]


def get(own: cluster.OwnCluster, path: str) -> Any:
    token = Path(own.token_file).read_text()
    request = urllib.request.Request(own.dashboard_url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def metrics(port: int) -> str:
    address = ray.nodes()[0]["NodeManagerAddress"]
    with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_without_its_packages_it_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("aiohttp_cors") or name == "opencensus":
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "ray.dashboard.optional_deps", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="are not installed") as caught:
        cluster.start(Cluster(dashboard=True)).__enter__()
    assert "dinov3-orchestrator[dashboard]" in str(caught.value)


def test_a_joined_cluster_has_its_own_or_none() -> None:
    with pytest.raises(UserError, match=r"needs .cluster.address: local."):
        cluster.start(Cluster(address="127.0.0.1:6379", dashboard=True)).__enter__()
