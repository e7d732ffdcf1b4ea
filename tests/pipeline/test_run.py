"""Running, re-running, changing and failing, in one process and without a tracking server."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import recorded
import toys
from rich.console import Console

from orchestrator import disk
from orchestrator.config.schema import Cluster
from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import Choice, resolve
from orchestrator.pipeline.run.driver import execute
from orchestrator.pipeline.store.workspace import Workspace, work_hold
from orchestrator.stages.base import Context
from orchestrator.storage.local import LocalStore

from .conftest import Traces
from .driving import content, planned, run


def kept() -> list[Path]:
    """What is in the store, apart from who held it last."""
    paths = sorted(Path("runs").rglob("*"))
    return [path for path in paths if not {"holds", ".scratch"} & set(path.parts)]


def test_a_second_run_does_nothing_and_says_so(pipeline: Path, trace: Traces) -> None:
    code, _ = run(pipeline)
    assert (code, trace()) == (0, ["curate", "pretrain", "evaluate"])
    before = kept()
    code, said = run(pipeline)
    assert (code, trace()) == (0, [])
    assert "Nothing to do: all 3 stages are up to date." in said
    assert kept() == before


def artifact(kind: str) -> Path:
    return next(Path("runs/artifacts").glob(f"{kind}-*"))


def flip(path: Path) -> None:
    """One bit, and nothing else that shows."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_an_input_is_named_and_mended_before_it_is_read(
    pipeline: Path, trace: Traces
) -> None:
    run(pipeline)
    trace()
    whole = (artifact("pretrain") / "result.json").read_bytes()
    flip(artifact("pretrain") / "result.json")
    code, said = run(pipeline, "stages.evaluate.ticks=2")
    assert (code, trace()) == (0, ["pretrain", "evaluate"])
    assert "the artifact of pretrain is damaged and is made again: artifacts/pretrain-" in said
    assert "result.json: content differs" in said
    assert (artifact("pretrain") / "result.json").read_bytes() == whole
    assert Workspace("runs").state("toy").stages["pretrain"].state == "done"


def test_damage_to_what_a_damaged_input_is_made_of_is_mended_first(pipeline: Path, trace: Traces) -> None:
    run(pipeline)
    trace()
    flip(artifact("pretrain") / "result.json")
    flip(artifact("curate") / "result.json")
    code, _ = run(pipeline, "stages.evaluate.ticks=2")
    assert (code, trace()) == (0, ["curate", "pretrain", "evaluate"])


def test_a_damaged_input_that_cannot_be_made_anew_stops_those_that_need_it(
    pipeline: Path, trace: Traces
) -> None:
    run(pipeline)
    trace()
    flip(artifact("pretrain") / "result.json")
    code, said = run(pipeline, "stages.evaluate.ticks=2", "stages.pretrain.mode=fail")
    assert (code, trace()) == (1, ["pretrain"])
    assert "lacks pretrain" in said


def test_a_damaged_input_whose_own_input_is_gone_is_a_failure(
    write: Callable[[str], Path], trace: Traces
) -> None:
    path = write(
        "name: toy\nstages:\n  a: {kind: curate}\n  b: {kind: pretrain, needs: a}\n"
        "  c: {kind: evaluate, needs: b}\n"
    )
    run(path)
    trace()
    flip(artifact("pretrain") / "result.json")
    shutil.rmtree(artifact("curate"))
    code, said = run(path, "stages.c.ticks=2", choice=Choice(first="c"))
    assert (code, trace()) == (1, [])
    assert "lacks a" in said
    assert "lacks b" in said
    assert [one["status"] for one in recorded.by_name("toy")] == ["FINISHED", "FAILED"]


def test_what_is_whole_is_read_once_a_driver(pipeline: Path) -> None:
    run(pipeline)
    for path in Path("runs/artifacts").rglob("*.json"):
        os.utime(path, (1e9, 1e9))
    size = sum(path.stat().st_size for path in Path("runs/artifacts").glob("*/result.json"))
    before = DIGESTS.bytes_read
    for ticks in (2, 3, 4):
        run(pipeline, f"stages.evaluate.ticks={ticks}")
    read = DIGESTS.bytes_read - before
    made = sum(path.stat().st_size for path in Path("runs/artifacts").glob("evaluate-*/result.json"))
    assert read <= size + made, "two inputs once, and what was made"


def test_planning_writes_nothing(pipeline: Path) -> None:
    assert {item.reasons for item in planned(pipeline).values()} == {("never ran",)}
    assert not Path("runs").exists()


def test_a_change_re_runs_the_stage_and_what_depends_on_it(pipeline: Path, trace: Traces) -> None:
    run(pipeline)
    trace()
    plans = planned(pipeline, "stages.pretrain.optim.lr=0.3")
    assert [item.action for item in plans.values()] == ["cached", "run", "run"]
    assert plans["pretrain"].reasons == ("config.optim.lr: 0.2 → 0.3",)
    assert plans["evaluate"].reasons[0].startswith("input model (pretrain): ")
    code, said = run(pipeline, "stages.pretrain.optim.lr=0.3")
    assert (code, trace()) == (0, ["pretrain", "evaluate"])
    assert "config.optim.lr: 0.2 → 0.3" in said
    run(pipeline, "stages.pretrain.optim.lr=0.3", "elastic.workers=4", "stages.pretrain.checkpoint_every=7")
    pipeline.write_text("# a comment\n" + pipeline.read_text())
    run(pipeline)
    assert trace() == [], "operational fields, comments and going back re-run nothing"


def test_after_going_back_a_change_is_explained_from_there(pipeline: Path) -> None:
    run(pipeline)
    run(pipeline, "stages.pretrain.optim.lr=0.3")
    run(pipeline)
    assert planned(pipeline, "stages.pretrain.optim.lr=0.4")["pretrain"].reasons == (
        "config.optim.lr: 0.2 → 0.4",
    )


def test_new_photos_re_run_what_reads_them(pipeline: Path, trace: Traces) -> None:
    run(pipeline)
    trace()
    Path("photos/b.jpg").write_text("b")
    assert planned(pipeline)["curate"].reasons == ("data photos: a → ab",)
    run(pipeline)
    assert trace() == ["curate", "pretrain", "evaluate"]


def test_a_lost_artifact_is_made_again_and_its_dependants_stay(pipeline: Path, trace: Traces) -> None:
    run(pipeline)
    trace()
    shutil.rmtree(next(Path("runs/artifacts").glob("pretrain-*")))
    assert planned(pipeline)["pretrain"].reasons == ("its artifact is gone or damaged",)
    run(pipeline)
    assert trace() == ["pretrain"]


def test_a_failed_stage_takes_only_its_dependants_along(write: Callable[[str], Path], trace: Traces) -> None:
    path = write(
        "name: toy\nstages:\n  a: {kind: curate}\n  b: {kind: pretrain, needs: a, mode: fail, ticks: 2}\n"
        "  c: {kind: evaluate, needs: b}\n  d: {kind: pretrain, needs: a}\n"
    )
    code, said = run(path)
    assert (code, trace()) == (1, ["a", "b", "d"])
    assert "RuntimeError: the toy broke" in said
    assert "lacks b" in said
    assert "Traceback" not in said
    log = Path("runs/logs/toy/b.log").read_text()
    assert "Traceback" in log
    assert "tick 2 of 2" in log
    assert {name: recorded.by_name(name)[0]["status"] for name in "abd"} == {
        "a": "FINISHED",
        "b": "FAILED",
        "d": "FINISHED",
    }
    assert recorded.by_name("toy")[0]["status"] == "FAILED"

    code, said = run(path, "stages.b.mode=fine")
    assert (code, trace()) == (0, ["b", "c"])
    assert "attempt 2, attempt 1 failed: RuntimeError: the toy broke" in said
    assert [(item["status"], item["opened"]) for item in recorded.by_name("b")] == [("FINISHED", 2)]
    assert [(item["status"], item["opened"]) for item in recorded.by_name("toy")] == [("FINISHED", 2)]


def test_a_users_mistake_found_by_a_stage_exits_with_two(pipeline: Path) -> None:
    code, said = run(pipeline, "stages.pretrain.mode=mistake")
    assert code == 2
    for part in ("the toy does not fit", "toy box", "use another box"):
        assert part in said


def test_a_promised_output_that_is_missing_fails_the_stage(pipeline: Path) -> None:
    code, said = run(pipeline, "stages.pretrain.mode=forget")
    assert code == 1
    assert "result.json" in said
    assert not list(Path("runs/artifacts").glob("pretrain-*"))


def test_work_lasts_until_the_stage_is_done(pipeline: Path) -> None:
    run(pipeline, "stages.pretrain.mode=fail", "stages.pretrain.ticks=3")
    work = next(Path("runs/work").glob("pretrain-*/"))
    assert (work / "ticks").read_text() == "3"
    run(pipeline, "stages.pretrain.ticks=3")
    assert not list(Path("runs/work").glob("pretrain-*"))


def test_an_artifact_knows_where_it_came_from(pipeline: Path) -> None:
    run(pipeline)
    manifest = planned(pipeline)["evaluate"].artifact.manifest  # type: ignore[union-attr]
    assert manifest.summary["ticks"] == 1
    assert set(manifest.provenance["upstream"]) == {"pretrain", "curate"}
    assert manifest.provenance["parts"]["config"]["ticks"] == 1


def test_a_second_driver_is_told_who_holds_the_pipeline(pipeline: Path) -> None:
    with Workspace("runs/").drive("toy"), pytest.raises(UserError) as caught:
        run(pipeline)
    assert "process " in caught.value.what
    assert " since 20" in caught.value.what
    assert run(pipeline)[0] == 0


def test_the_ledger_goes_on_when_the_folder_of_holds_was_wiped(pipeline: Path) -> None:
    for lr in (0.3, 0.4):
        run(pipeline, f"stages.pretrain.optim.lr={lr}")
    shutil.rmtree("runs/holds")
    assert run(pipeline, "stages.pretrain.optim.lr=0.5")[0] == 0
    plans = planned(pipeline, "stages.pretrain.optim.lr=0.5")
    assert plans["pretrain"].reasons[0].startswith("nothing changed"), "the newest events count"


def test_two_pipelines_do_not_work_on_one_key_at_once(pipeline: Path) -> None:
    stage = planned(pipeline)["curate"].stage
    with Workspace("runs/").leases.hold(work_hold("curate", stage.key), "other"):
        code, said = run(pipeline)
    assert code == 2
    assert "already being run by process" in said
    assert f"at   the store {Path('runs').absolute()}" in said
    assert run(pipeline)[0] == 0


def test_work_is_removed_by_who_holds_it(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another pipeline may have begun on it by then."""
    held = []
    drop_work = Workspace.drop_work

    def drop(self: Workspace, kind: str, key: str) -> None:
        held.append(Workspace("runs/").leases.holder(work_hold(kind, key)) is not None)
        drop_work(self, kind, key)

    monkeypatch.setattr(Workspace, "drop_work", drop)
    assert run(pipeline)[0] == 0
    assert held == [True] * 3


class Rayish(toys.Curate):
    needs_ray: ClassVar[bool] = True


def test_the_cluster_starts_only_for_a_stage_that_runs_and_needs_it(pipeline: Path) -> None:
    started: list[str] = []

    @contextlib.contextmanager
    def start(cluster: Cluster) -> Iterator[None]:
        started.append(cluster.address)
        yield
        started.append("stopped")

    def run_with(overrides: list[str]) -> int:
        loaded = load(pipeline, overrides, stage_type=toys.ToyStage)
        rayish = Rayish.model_validate(loaded.spec.stages["curate"].model_dump())
        spec = loaded.spec.model_copy(update={"stages": {**loaded.spec.stages, "curate": rayish}})
        loaded = type(loaded)(spec, loaded.document)
        stages = resolve(loaded, content)
        reporter = Reporter(Console(file=io.StringIO()))
        return execute(loaded, stages, reporter, start_cluster=start, open_tracking=recorded.open_recorded)

    assert run_with([]) == 0
    assert started == ["local", "stopped"]
    assert run_with(["stages.pretrain.ticks=3"]) == 0
    assert started == ["local", "stopped"]


def test_an_own_cluster_starts_before_stages_that_do_without_and_never_beside_one(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray forks the driver, and a fork while another thread computes may never return."""
    happened: list[str] = []

    @contextlib.contextmanager
    def start(cluster: Cluster) -> Iterator[None]:
        assert threading.current_thread() is threading.main_thread(), "signal handlers can be set in no other"
        assert "stage" not in {thread.name for thread in threading.enumerate()}
        happened.append("starts")
        yield
        happened.append("ends")

    original = toys.Curate.run

    def run(self: toys.Curate, context: Context) -> object:
        happened.append("curate")
        return original(self, context)

    monkeypatch.setattr(toys.Curate, "run", run)
    monkeypatch.setattr(toys.Pretrain, "needs_ray", True)
    loaded = load(pipeline, stage_type=toys.ToyStage)
    reporter = Reporter(Console(file=io.StringIO()))
    stages = resolve(loaded, content)
    code = execute(loaded, stages, reporter, start_cluster=start, open_tracking=recorded.open_recorded)
    assert code == 0
    assert happened == ["starts", "curate", "ends"]


def test_a_stage_gets_what_it_was_promised(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    original = toys.Toy.run

    def spy(self: toys.Toy, context: toys.Context) -> object:
        seen[context.name] = context
        assert not list(context.out.iterdir())
        logging.getLogger("orchestrator.somewhere").warning("mind the gap")
        return original(self, context)

    monkeypatch.setattr(toys.Toy, "run", spy)
    _, said = run(
        pipeline,
        "stages.pretrain.elastic.workers=3",
        "elastic.checkpoint_every_s=7",
        "elastic.resources.memory=8GiB",
        "stages.pretrain.elastic.resources.gpu=0.5",
    )
    context = seen["pretrain"]
    assert context.elastic.workers == (3, 3)
    assert (context.elastic.resources.memory, context.elastic.resources.gpu) == (8 * 2**30, 0.5)
    assert seen["curate"].elastic.resources.gpu is None
    assert context.elastic.checkpoint_every_s == 7
    assert context.inputs["index"].kind == "curate"
    assert context.keys == {"curate": context.inputs["index"].key}
    assert seen["evaluate"].keys.keys() == {"pretrain", "curate"}
    assert "mind the gap" in said
    assert "mind the gap" in Path("runs/logs/toy/pretrain.log").read_text()


def test_a_piece_of_a_result_is_an_artifact_that_outlives_changes_of_the_others(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As students are: the stage's key changes with each of them, theirs do not."""
    pieces: dict[str, float] = {"a": 1.0, "b": -1.0}
    made: list[str] = []

    def run_pieces(self: toys.Pretrain, context: Context) -> dict[str, float]:
        found = {}
        for name, value in pieces.items():
            with context.part("piece", {"name": name, "value": value}) as part:
                if part.artifact is None:
                    made.append(name)
                    (part.work / "under-way").touch()
                    if value < 0:
                        raise RuntimeError(f"{name} broke")
                    draft = context.out.with_name(f"draft-{name}")
                    draft.mkdir()
                    (draft / "value").write_text(str(value))
                    folder = part.publish(draft, {"value": value})
                    assert not part.work.exists(), "work is over once the artifact is there"
                else:
                    folder = part.artifact
                found[name] = float((folder / "value").read_text())
        (context.out / "result.json").write_text("{}")
        return found

    monkeypatch.setattr(toys.Pretrain, "run", run_pieces)
    code, said = run(pipeline)
    assert (code, made) == (1, ["a", "b"])
    assert "b broke" in said
    kept_work = list(Path("runs/work").glob("piece-*"))
    assert len(kept_work) == 1, "the broken one's, with what was under way"
    assert (kept_work[0] / "under-way").exists()
    pieces["b"] = 2.0
    made.clear()
    assert run(pipeline, "stages.pretrain.ticks=7")[0] == 0, "another key of the stage"
    assert made == ["b"]
    pieces["c"] = 3.0
    made.clear()
    assert run(pipeline, "stages.pretrain.ticks=8")[0] == 0
    assert made == ["c"]
    manifests = [
        json.loads(path.read_text()) for path in Path("runs/artifacts").glob("piece-*/manifest.json")
    ]
    assert {one["provenance"]["parts"]["config"]["name"] for one in manifests} == {"a", "b", "c"}
    assert all(one["provenance"]["stage"] == "pretrain" for one in manifests)
    code, _ = run(pipeline, "stages.pretrain.ticks=9", "seed=5")
    assert sorted(made) == ["a", "b", "c", "c"], "the seed decides all of them"


def test_the_end_names_what_is_to_be_looked_at(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.pipeline.run.driver.REPORTS", ("page.html", "result.json"))
    for _ in range(2):
        said = run(pipeline)[1]
        assert re.search(r"report of evaluate: runs/artifacts/evaluate-[0-9a-f]+/result.json", said)


def test_a_full_disk_under_the_store_is_one_sentence(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage meets it first, and then whatever would put that on record."""
    real = LocalStore.put_bytes

    def full(store: LocalStore, name: str, data: bytes) -> None:
        if name.startswith("ledger/") and b'"failed"' in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(store, name, data)

    def fails(*_: object) -> Mapping[str, float]:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/work/ticks")

    with monkeypatch.context() as patch:
        patch.setattr(toys.Toy, "run", fails)
        patch.setattr(disk, "space", lambda path: (0, 40_000_000))
        code, said = run(pipeline)
        assert code == 2
        assert re.search(r"the disk of .*runs/work is full \([\d.,]+ of [\d.,]+ MB free\)", said)
        assert "free some space on it and run the same command" in said
        patch.setattr(LocalStore, "put_bytes", full)
        with pytest.raises(UserError, match=r"the disk of .* is full") as caught:
            run(pipeline)
        assert "are kept" in (caught.value.hint or "")
    assert run(pipeline)[0] == 0


def test_a_file_that_concerns_one_piece_makes_no_other_anew(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the source of a student's own network."""
    made: list[str] = []

    def run_pieces(self: toys.Pretrain, context: Context) -> dict[str, float]:
        for name in ("a", "b"):
            with context.part("piece", {"name": name}) as part:
                if part.artifact is None:
                    made.append(name)
                    draft = context.out.with_name(f"draft-{name}")
                    draft.mkdir()
                    (draft / "value").touch()
                    part.publish(draft, {})
        (context.out / "result.json").write_text("{}")
        return {}

    def files(self: toys.Pretrain) -> dict[str, tuple[Path, ...]]:
        return {f"pieces.{name}": (Path(f"{name}.py").absolute(),) for name in ("a", "b", "all")}

    def concerns(self: toys.Pretrain, field: str, part: Mapping[str, Any]) -> bool:
        return not field.startswith("pieces.") or field in ("pieces.all", f"pieces.{part['name']}")

    for name in ("a", "b", "all"):
        Path(f"{name}.py").write_text("1")
    monkeypatch.setattr(toys.Pretrain, "run", run_pieces)
    monkeypatch.setattr(toys.Pretrain, "files", files)
    monkeypatch.setattr(toys.Pretrain, "concerns", concerns)
    for changed, wanted in ((None, ["a", "b"]), ("b", ["b"]), ("all", ["a", "b"])):
        if changed:
            Path(f"{changed}.py").write_text("2")
        made.clear()
        assert run(pipeline)[0] == 0
        assert made == wanted
