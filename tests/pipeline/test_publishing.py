"""A model of a user's own kind from a pipeline file into a real registry: published, rolled back, and forced."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from mlflow import MlflowClient
from pydantic import Field
from rich.console import Console

from orchestrator.models import build, save_pretrained
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, resolve
from orchestrator.pipeline.run.driver import execute, publishing
from orchestrator.stages.base import Context, Stage
from orchestrator.stages.publish.config import Publish
from orchestrator.tracking.download import pull
from orchestrator.tracking.rollback import rollback

URI = "sqlite:///runs/mlflow.db"
PIPELINE = """\
name: own
stages:
  tuned: {kind: tuned}
  publish: {kind: publish, needs: tuned}
"""


class Tuned(Stage):
    """Makes a model by drawing it."""

    kind: Literal["tuned"]
    draw: int = 0
    needs_ray: ClassVar[bool] = False
    outputs: ClassVar[Mapping[str, str]] = {"weights": "a model"}

    def models(self) -> Mapping[str, str]:
        return {"": "weights"}

    def run(self, context: Context) -> Mapping[str, float]:
        torch.manual_seed(self.draw)
        save_pretrained(
            context.out / "weights", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16}
        )
        return {"drawn": float(self.draw)}


AnyToy = Annotated[Tuned | Publish, Field(discriminator="kind")]


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(PIPELINE)
    (tmp_path / "runs").mkdir()
    shutil.copyfile(empty_database, tmp_path / "runs" / "mlflow.db")
    return tmp_path


def run(*overrides: str, publish: bool = False, force: bool = False) -> str:
    """What a run says that ends well."""
    loaded = load("own.yaml", overrides, stage_type=AnyToy)
    stages = resolve(loaded)
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=200), "orchestrator run own.yaml")
    choice = publishing(loaded, stages, force=force) if publish else EVERYTHING
    assert execute(loaded, stages, reporter, choice=choice) == 0, output.getvalue()
    return output.getvalue()


@pytest.mark.heavy
def test_a_model_of_a_users_kind_goes_in_back_and_in_by_force(folder: Path) -> None:
    client = MlflowClient(URI, URI)

    def champion() -> int:
        return int(client.get_registered_model("own-tuned").aliases["champion"])

    run()
    assert "The registry already has what publish publishes." in run()
    run("stages.tuned.draw=1")
    assert champion() == 2
    card = (pull("own-tuned@champion", folder / "pulled", URI) / "README.md").read_text()
    assert "    orchestrator run own.yaml stages.tuned.draw=1\n" in card
    assert client.get_model_version("own-tuned", "2").tags["orchestrator.stage"] == "tuned"

    assert rollback("own-tuned", URI).now == 1
    said = run("stages.tuned.draw=1")
    assert "! own-tuned version 2 was rolled back, and version 1 keeps the alias champion" in said
    assert "Nothing to do" in said
    assert champion() == 1
    run("stages.tuned.draw=1", publish=True)
    assert champion() == 1
    run("stages.tuned.draw=1", publish=True, force=True)
    assert champion() == 2
    assert "rolled back" not in run("stages.tuned.draw=1")
    assert champion() == 2
