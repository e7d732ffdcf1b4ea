"""Nobody outside this machine reaches the pipeline's own cluster, whichever process listens (docs/security.md)."""

from __future__ import annotations

import os
import sys
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.elastic.reaper import members

sys.path.insert(0, str(Path(__file__).parent))
from running import Running
from tiny import tiny_job


def listening(own: cluster.OwnCluster) -> dict[str, set[str]]:
    """Addresses at which the driver and all processes of its cluster accept connections, by what the process is."""
    found: dict[str, set[str]] = {}
    for pid in {*members(str(own._folder)), os.getpid()}:
        try:
            process = psutil.Process(pid)
            name = process.name() if pid != os.getpid() else "driver"
            sockets = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        for one in sockets:
            if one.status == psutil.CONN_LISTEN or (one.laddr and not one.raddr):
                found.setdefault(name, set()).add(one.laddr.ip)
    return found


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback


def test_an_own_cluster_listens_on_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    # What was there before is not ours to judge: a plugin of the test run may listen.
    others = {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.laddr and not one.raddr}
    with cluster.start(Cluster(), prestart=2) as own:
        assert isinstance(own, cluster.OwnCluster)
        hold = tmp_path / "shown-faults" / "hold-5"
        job = tiny_job(tmp_path / "shown", 10, 2)
        hold.touch()
        running = Running(job)
        running.wait(lambda: running.step() >= 4)
        found = listening(own)
        kinds = {kind.partition(":")[0] for kind in found}
        assert {"driver", "gcs_server", "raylet", "ray"} <= kinds, f"the test must see them all: {found}"
        open_to_others = {
            kind: bad
            for kind, all in found.items()
            if (bad := {one for one in all if not is_loopback(one)} - others)
        }
        assert open_to_others == {}
        assert own._folder.stat().st_mode & 0o077 == 0, "its Unix sockets are the owner's alone"
        assert Path(own.token_file).stat().st_mode & 0o077 == 0
        hold.unlink()
        running.finish()
