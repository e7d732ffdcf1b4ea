"""Stages that change something outside the store: compared on each run, and made so."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import recorded
import toys
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.pipeline.console import Reporter, figures
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice, plan, resolve
from orchestrator.pipeline.run.driver import execute, publishing
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import Context
from orchestrator.training.checkpoint.format import COMMIT, step_name

from .conftest import Traces

PIPELINE = """\
name: toy
data:
  photos: {path: photos}
stages:
  curate: {kind: curate, data: photos}
  pretrain: {kind: pretrain, needs: curate}
  evaluate: {kind: evaluate, needs: [pretrain, curate]}
  publish: {kind: publish, needs: pretrain, outside: outside.txt}
"""
OUTSIDE = Path("outside.txt")


@pytest.fixture
def path(write: Callable[[str], Path]) -> Path:
    return write(PIPELINE)


def run(
    path: Path, *overrides: str, only_publish: bool = False, choice: Choice = EVERYTHING
) -> tuple[int, str]:
    """Exit code and output."""
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    stages = resolve(loaded, lambda source, name: name)
    choice = publishing(loaded, stages) if only_publish else choice
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=200), "orchestrator run toy.yaml")
    code = execute(loaded, stages, reporter, open_tracking=recorded.open_recorded, choice=choice)
    return code, output.getvalue()


def test_a_second_run_changes_nothing_and_says_so(path: Path, trace: Traces) -> None:
    assert run(path)[0] == 0
    assert trace() == ["curate", "pretrain", "evaluate", "publish"]
    wrote = OUTSIDE.stat().st_mtime_ns
    code, said = run(path)
    assert (code, trace()) == (0, [])
    assert (
        "Nothing to do: all 4 stages are up to date. The registry already has what publish publishes." in said
    )
    assert OUTSIDE.stat().st_mtime_ns == wrote
    assert len(recorded.by_name("toy")) == 1, "a look opens no tracking run"


@pytest.mark.parametrize("change", ["name=other", "tracking.uri=sqlite:///elsewhere.db"])
def test_what_no_key_knows_is_published_all_the_same(path: Path, change: str, trace: Traces) -> None:
    run(path)
    trace()
    code, said = run(path, change)
    assert (code, trace()) == (0, ["publish"])
    assert "outside.txt says 'toy sqlite:///runs/mlflow.db hello'" in said
    assert change.partition("=")[2] in OUTSIDE.read_text()
    code, said = run(path, change)
    assert "Nothing to do" in said


def test_what_was_changed_outside_is_put_right(path: Path, trace: Traces) -> None:
    run(path)
    OUTSIDE.write_text("somebody else was here")
    trace()
    # The new evaluation runs; publishing, whose key is as it was, is compared when its turn comes.
    code, said = run(path, "stages.evaluate.ticks=2")
    assert (code, trace()) == (0, ["evaluate", "publish"])
    assert "somebody else was here" in said
    assert OUTSIDE.read_text().startswith("toy ")


def test_what_is_published_again_is_what_the_artifact_says(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input was made anew, with other content: the key is as it was, and what is outside is not."""
    original = toys.Publish.run

    def publish(self: toys.Publish, context: Context) -> object:
        figures = original(self, context)
        (context.out / "result.json").write_text((context.inputs["model"].path / "result.json").read_text())
        return figures

    monkeypatch.setattr(toys.Publish, "run", publish)
    run(path)
    (model,) = Path("runs/artifacts").glob("pretrain-*")
    put(model, "result.json", "made anew")
    OUTSIDE.write_text("has the old one")
    assert run(path)[0] == 0
    (published,) = Path("runs/artifacts").glob("publish-*")
    assert (published / "result.json").read_text() == "made anew"
    assert "Nothing to do" in run(path)[1]


def put(artifact: Path, name: str, text: str) -> None:
    """Other content in an artifact that is whole."""
    (artifact / name).write_text(text)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def test_what_lacks_its_input_is_not_compared_and_says_so(path: Path, trace: Traces) -> None:
    run(path)
    trace()
    (model,) = Path("runs/artifacts").glob("pretrain-*")
    shutil.rmtree(model)
    code, said = run(path, choice=Choice(only=("publish",)))
    assert (code, trace()) == (0, [])
    assert "! what publish publishes was not compared with the registry: not done: pretrain" in said
    assert "Nothing to do: publish is up to date.\n" in said


def test_what_cannot_be_compared_is_run_and_says_why(path: Path) -> None:
    run(path)
    OUTSIDE.unlink()
    OUTSIDE.mkdir()
    code, said = run(path)
    assert code == 1
    assert "the outside does not answer" in said
    OUTSIDE.rmdir()
    code, said = run(path)
    assert code == 0
    assert len(recorded.by_name("publish")) == 2, "the failed attempt's run goes on"


def test_publish_alone(path: Path, trace: Traces) -> None:
    with pytest.raises(UserError, match="nothing to publish: stage 'pretrain' is not done"):
        run(path, only_publish=True)
    assert run(path, "stages.evaluate.mode=fail")[0] == 1
    assert trace() == ["curate", "pretrain", "evaluate", "publish"]
    OUTSIDE.unlink()
    code, said = run(path, only_publish=True)
    assert (code, trace()) == (0, ["publish"]), said
    assert "▶ evaluate" not in said
    (root,) = recorded.by_name("toy")
    assert root["status"] == "FAILED", "evaluate failed still"
    code, said = run(path, only_publish=True)
    assert (code, trace()) == (0, [])
    assert run(path)[0] == 0
    assert trace() == ["evaluate"]


def test_a_pipeline_that_publishes_nothing_is_told_so(pipeline: Path) -> None:
    loaded = load(pipeline, stage_type=toys.ToyStage)
    with pytest.raises(UserError, match="publishes nothing"):
        publishing(loaded, resolve(loaded, lambda source, name: name))


def test_going_on_says_from_which_step(path: Path) -> None:
    run(path, "stages.pretrain.mode=fail")
    loaded = load(path, stage_type=toys.ToyStage)
    stages = resolve(loaded, lambda source, name: name)
    workspace = Workspace(loaded.spec.store)
    (pretrain,) = [stage for stage in stages if stage.name == "pretrain"]

    def reason() -> str:
        state = workspace.state(loaded.name)
        plans = plan(stages, state, workspace.find, reached=workspace.reached)
        return next(item for item in plans if item.name == "pretrain").reasons[0]

    assert reason() == "attempt 1 failed: RuntimeError: the toy broke"
    work = workspace.work("pretrain", pretrain.key)
    workspace.note_piece("pretrain", pretrain.key, "nano", "student", "a" * 64)
    workspace.note_piece("pretrain", pretrain.key, "pico", "student", "b" * 64)
    for folder, step in ((workspace.work("student", "a" * 64), 7), (workspace.work("student", "a" * 64), 12)):
        commit = folder / "checkpoints" / step_name(step) / COMMIT
        commit.parent.mkdir(parents=True)
        commit.write_text("{}")
    assert reason().endswith("the toy broke, goes on from step 12 (nano)")
    commit = work / "checkpoints" / step_name(40) / COMMIT
    commit.parent.mkdir(parents=True)
    assert "40" not in reason(), "not committed yet"
    commit.write_text("{}")
    assert reason().endswith("the toy broke, goes on from step 40")
    _, said = run(path)
    assert "goes on from step 40" in said


@pytest.mark.parametrize(
    ("uri", "how"),
    [
        ("sqlite:///runs/mlflow.db", "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"),
        ("https://mlflow.example:5000", "https://mlflow.example:5000"),
    ],
)
def test_the_last_lines_say_where_the_user_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, how: str
) -> None:
    names = ["toy-a@champion", "toy-b@champion", "toy-c", "toy-d"]
    monkeypatch.setattr(toys.Publish, "published", lambda *arguments: names, raising=False)
    _, said = run(path, f"tracking.uri={uri}")
    lines = [line for line in said.splitlines() if line.startswith("  ")][-4:]
    place = "" if uri.startswith("sqlite") else f" --tracking {uri}"
    assert [line.partition("orchestrator ")[2] for line in lines[:3]] == [
        f"pull toy-a@champion --out a{place}",
        f"pull toy-b@champion --out b{place}",
        f"pull toy-c --out c{place}",
    ]
    assert lines[3].startswith("  runs and models: ")
    assert lines[3].endswith(how)


def test_figures_leave_out_troubles_that_there_were_none_of() -> None:
    summary = {"loss": 3.25, "seconds_total": 12.0, "restarts": 0.0, "preemptions": 2.0, "share": 0.0}
    assert figures(summary) == "loss 3.25 · preemptions 2 · share 0"
