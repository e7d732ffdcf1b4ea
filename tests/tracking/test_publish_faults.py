"""Publishing with every change in the registry failing in turn, before or after it happened: one version in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_faults import KINDS, Kind, every_fault, goes_through
from mlflow import MlflowClient
from safetensors.numpy import save_file

from orchestrator.errors import UserError
from orchestrator.tracking import download, registry
from orchestrator.tracking.run import Tracking

LINEAGE = {"dataset": "food", "key.pretrain": "ab12"}
_CHANGES = (
    "create_registered_model", "create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_batch",
    "log_outputs", "create_model_version", "set_registered_model_tag", "set_registered_model_alias",
    "delete_model_version",
)  # fmt: skip


class Client:
    """An MLflow client whose n-th change fails; with `lost` after it happened."""

    def __init__(self, client: MlflowClient, fail_at: int, lost: bool) -> None:
        self._client, self._fail_at, self._lost = client, fail_at, lost
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name not in _CHANGES:
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.count += 1
            fails = self.count == self._fail_at
            answer = None if fails and not self._lost else real(*args, **options)
            if fails:
                raise ConnectionError("the server went away")
            return answer

        return call


def model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir()
    save_file({"weight": np.full((2, 3), value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"preset": "vit_femto"}))
    return folder


@pytest.mark.parametrize("lost", [False, True])
def test_publishing_goes_on_after_any_fault(
    start: Callable[[], Tracking], uri: str, tmp_path: Path, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start().run("food")
    facts = registry.Facts(metrics={"loss": 1.0}, step=3)
    old, new = model(tmp_path / "old", 1.0), model(tmp_path / "new", 2.0)
    real = registry.connect
    fail_at = failed = 0
    while True:
        fail_at += 1
        name = f"vit-{fail_at}"
        assert registry.publish(run, name, old, LINEAGE, "best", facts=facts) == 1
        client = Client(real(uri), fail_at, lost)
        monkeypatch.setattr(registry, "connect", lambda uri, client=client: client)
        try:
            registry.publish(run, name, new, LINEAGE, "best", facts=facts)
        except (UserError, ConnectionError):
            failed += 1
        monkeypatch.setattr(registry, "connect", real)
        # Whoever pulls meanwhile gets the old model or the new one, whole.
        pulled = download.pull(f"{name}@best", tmp_path / f"pulled-{fail_at}", uri)
        bytes_of = [(folder / "model.safetensors").read_bytes() for folder in (pulled, old, new)]
        assert bytes_of[0] in bytes_of[1:]
        number = registry.publish(run, name, new, LINEAGE, "best", facts=facts)
        versions = real(uri).search_model_versions(f"name = '{name}'")
        assert len({one.source for one in versions if int(one.version) > 1}) == 1, (
            "the same files are not kept twice"
        )
        assert int(real(uri).get_model_version_by_alias(name, "best").version) == number
        pulled = download.pull(f"{name}@best", tmp_path / f"again-{fail_at}", uri)
        assert (pulled / "model.safetensors").read_bytes() == bytes_of[2]
        assert registry.publish(run, name, new, LINEAGE, "best", facts=facts) == number, "and then it rests"
        if client.count < fail_at:
            break
    assert failed >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_appears_whole_or_not_at_all(
    start: Callable[[], Tracking], uri: str, tmp_path: Path, kind: Kind
) -> None:
    registry.publish(start().run("food"), "vit", model(tmp_path / "model"), LINEAGE, "best")
    download.pull("vit@best", tmp_path / "warm", uri)
    for disk in every_fault(kind, at_least=4):
        out = tmp_path / f"out-{disk.fail_at}" / "vit"
        went = goes_through(disk, lambda: download.pull("vit@best", out, uri))  # noqa: B023
        # What fails after it has its name, as waiting for the disk may, leaves it whole.
        assert out.exists() or not went
        if out.exists():
            assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
        else:
            download.pull("vit@best", out, uri)
        assert (out / "model.safetensors").read_bytes() == (
            tmp_path / "model" / "model.safetensors"
        ).read_bytes()
        if kind == "full":
            assert list(out.parent.iterdir()) == [out]
