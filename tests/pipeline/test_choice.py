"""Stages by choice, made anew on request, and what is said of other code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from driving import planned, run
from toys import Curate, Pretrain

from orchestrator.errors import UserError
from orchestrator.pipeline.keys import code_digest
from orchestrator.pipeline.plan.stage_plan import Choice
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import Context

Traces = Callable[[], list[str]]


@pytest.fixture
def trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Stages that really ran since the last call, and the tick that each began at."""
    path = folder / "trace"
    monkeypatch.setenv("TOY_TRACE", str(path))

    def ran() -> list[str]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [":".join(line.split()[:2]) for line in lines]

    return ran


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The code of today, to be changed."""
    found = {"training/loop.py": "a", "config/schema.py": "b", "stages/toy.py": "c", "data/rng.py": "d"}
    monkeypatch.setattr(code_digest, "code_of", lambda module: dict(found))
    return found


def actions(path: Path, *overrides: str, choice: Choice) -> list[str]:
    return [item.action for item in planned(path, *overrides, choice=choice).values()]


# --- code -------------------------------------------------------------------------------------------------------


def test_other_code_re_runs_nothing_and_is_named(
    pipeline: Path, trace: Traces, files: dict[str, str]
) -> None:
    run(pipeline)
    assert len(trace()) == 3
    files["training/loop.py"] = "2"
    plans = planned(pipeline)
    assert [item.action for item in plans.values()] == ["cached"] * 3
    (why,) = plans["pretrain"].reasons
    assert why.endswith("(made by other code: training/loop.py)")
    exit_code, said = run(pipeline)
    assert (exit_code, trace()) == (0, [])
    assert "--rerun-on code makes them again" in said
    files |= {"config/schema.py": "2", "data/rng.py": "2", "more.py": "2"}
    assert (
        planned(pipeline)["pretrain"]
        .reasons[0]
        .endswith("(made by other code: config/schema.py, data/rng.py, more.py and 1 more)")
    )


def test_rerun_on_code_makes_it_anew_once(pipeline: Path, trace: Traces, files: dict[str, str]) -> None:
    run(pipeline)
    trace()
    files["config/schema.py"] = "2"
    _, said = run(pipeline, choice=Choice(on_code=True))
    assert trace() == ["curate:0", "pretrain:0", "evaluate:0"]
    assert "made by other code: config/schema.py" in said
    assert run(pipeline, choice=Choice(on_code=True))[1].startswith("✓ Nothing to do")
    assert planned(pipeline)["pretrain"].other_code == ()


def test_unfinished_work_outlives_a_change_of_code(
    pipeline: Path, trace: Traces, files: dict[str, str]
) -> None:
    """Three ticks are done and kept: an upgrade goes on from there, and starts over only if it is told to."""
    overrides = ["stages.pretrain.ticks=3"]
    for choice, begun, note in (
        (Choice(), "pretrain:3", "begun by other code"),
        (Choice(on_code=True, only=("pretrain",)), "pretrain:0", "so it starts over"),
    ):
        assert run(pipeline, *overrides, "stages.pretrain.mode=fail")[0] == 1
        trace()
        files["training/loop.py"] += "2"
        exit_code, said = run(pipeline, *overrides, choice=choice)
        assert (exit_code, begun in trace()) == (0, True)
        assert note in said
        overrides.append("seed=1")


def test_what_made_an_artifact_is_in_its_manifest(pipeline: Path, files: dict[str, str]) -> None:
    run(pipeline)
    plans = planned(pipeline)
    provenance = plans["pretrain"].artifact.manifest.provenance  # type: ignore[union-attr]
    assert provenance["code"] == {"digest": code_digest.digest_of(files), "files": files}
    assert {"torch", "pillow", "opencv-python-headless"} <= provenance["versions"].keys()
    assert provenance["made_by"]["python"] == ".".join(str(one) for one in sys.version_info[:2])
    assert provenance["inputs"] == {"index": plans["curate"].artifact.manifest.digest}  # type: ignore[union-attr]
    assert "code" not in provenance["parts"]


def test_another_version_of_a_package_is_other_code(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pipeline)
    (path,) = Path("runs/artifacts").glob("pretrain-*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["provenance"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(manifest))
    assert planned(pipeline)["pretrain"].other_code == ("torch 1.0",)


# --- force ------------------------------------------------------------------------------------------------------


def test_force_makes_a_stage_anew_and_what_depends_on_it(pipeline: Path, trace: Traces) -> None:
    run(pipeline)
    trace()
    plans = planned(pipeline, choice=Choice(force=("pretrain",)))
    assert plans["pretrain"].reasons == ("made again: --force",)
    assert plans["evaluate"].reasons == ("input model (pretrain) is made again",)
    assert run(pipeline, choice=Choice(force=("pretrain",)))[0] == 0
    assert trace() == ["pretrain:0", "evaluate:0"]
    assert len(list(Path("runs/artifacts").iterdir())) == 3
    assert run(pipeline)[1].startswith("✓ Nothing to do")
    state = Workspace("runs/").state("toy").stages["pretrain"]
    assert (state.state, state.attempts) == ("done", 1)


def test_a_forced_stage_alone_leaves_a_note_on_what_was_made_from_the_earlier_one(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pipeline)
    choice = Choice(only=("pretrain",), force=("pretrain",))
    run(pipeline, choice=choice)
    assert "earlier" not in planned(pipeline)["evaluate"].reasons[0], "the same content"
    original = Pretrain.run

    def other(self: Pretrain, context: Context) -> object:
        found = original(self, context)
        (context.out / "result.json").write_text("other")
        return found

    monkeypatch.setattr(Pretrain, "run", other)
    assert run(pipeline, choice=choice)[0] == 0
    (why,) = planned(pipeline)["evaluate"].reasons
    assert why.endswith("(made from an earlier pretrain)")


def test_a_forced_stage_that_fails_goes_on_without_force_and_the_old_artifact_stays_until_then(
    pipeline: Path, trace: Traces
) -> None:
    overrides = ["stages.pretrain.ticks=3"]
    run(pipeline, *overrides)
    trace()
    choice = Choice(force=("pretrain",))
    assert run(pipeline, *overrides, "stages.pretrain.mode=fail", choice=choice)[0] == 1
    assert trace() == ["pretrain:0"]
    plans = planned(pipeline, *overrides)
    assert plans["pretrain"].artifact is not None, "nobody loses what is there before the new one is"
    assert plans["pretrain"].reasons == ("attempt 1 failed: RuntimeError: the toy broke",)
    assert (plans["pretrain"].anew, plans["pretrain"].fresh) == (True, False)
    assert run(pipeline, *overrides)[0] == 0
    assert trace() == ["pretrain:3", "evaluate:0"]
    assert run(pipeline, *overrides)[1].startswith("✓ Nothing to do")


def test_force_starts_half_done_work_over(pipeline: Path, trace: Traces) -> None:
    run(pipeline, "stages.pretrain.ticks=3", "stages.pretrain.mode=fail")
    trace()
    assert run(pipeline, "stages.pretrain.ticks=3", choice=Choice(force=("pretrain",)))[0] == 0
    assert trace()[0] == "pretrain:0"
    assert Workspace("runs/").state("toy").stages["pretrain"].attempts == 1


class Pieces:
    """`pretrain` makes two, as `distill` makes students. `broken` ones fail; those that were `made` are counted."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.broken: set[str] = set()

    def run(self, context: Context) -> dict[str, float]:
        for name in "ab":
            with context.part("piece", {"name": name}) as part:
                if part.artifact is None:
                    if name in self.broken:
                        raise RuntimeError(f"{name} broke")
                    self.made.append(name)
                    draft = context.out.with_name(f"draft-{name}-{len(self.made)}")
                    draft.mkdir()
                    (draft / "number").write_text(str(len(self.made)))
                    part.publish(draft, {})
        (context.out / "result.json").write_text("{}")
        return {}

    @staticmethod
    def numbers() -> list[str]:
        """Of those in the store, when they were made."""
        return sorted(path.read_text() for path in Path("runs/artifacts").glob("piece-*/number"))


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    found = Pieces()
    monkeypatch.setattr(Pretrain, "run", lambda stage, context: found.run(context))
    return found


def test_a_forced_stage_makes_its_pieces_anew_too(pipeline: Path, pieces: Pieces) -> None:
    pieces.broken.add("b")
    assert run(pipeline)[0] == 1
    pieces.broken.clear()
    assert run(pipeline)[0] == 0
    assert pieces.made == ["a", "b"]
    pieces.broken.add("b")
    assert run(pipeline, choice=Choice(force=("pretrain",)))[0] == 1
    pieces.broken.clear()
    assert run(pipeline)[0] == 0
    assert pieces.made == ["a", "b", "a", "b"], (
        "a was made anew by the forced run's first attempt, and not again"
    )
    assert pieces.numbers() == ["3", "4"]


@pytest.mark.parametrize("forced", ["pretrain", "curate"])
def test_pieces_of_an_unfinished_stage_are_made_anew_with_it(
    pipeline: Path, pieces: Pieces, forced: str
) -> None:
    """Also where what it reads is: else it would gather pieces of the earlier input and of the new one."""
    pieces.broken.add("b")
    assert run(pipeline)[0] == 1
    assert pieces.made == ["a"]
    choice = Choice(force=(forced,))
    plan = planned(pipeline, choice=choice)["pretrain"]
    assert (plan.artifact, plan.anew, plan.fresh) == (None, True, True)
    assert run(pipeline, choice=choice)[0] == 1
    assert pieces.made == ["a", "a"]
    plan = planned(pipeline)["pretrain"]
    assert (plan.anew, plan.fresh) == (True, False), "it goes on, and replaces what is left of before"
    pieces.broken.clear()
    assert run(pipeline)[0] == 0
    assert pieces.made == ["a", "a", "b"], "what this run has made is not made again"
    assert pieces.numbers() == ["2", "3"]
    assert run(pipeline)[1].startswith("✓ Nothing to do")


def test_pieces_that_another_key_of_the_stage_made_are_made_anew_with_what_it_reads(
    pipeline: Path, pieces: Pieces
) -> None:
    assert run(pipeline)[0] == 0
    choice = Choice(force=("curate",))
    (why,) = planned(pipeline, "stages.pretrain.ticks=2", choice=choice)["pretrain"].reasons
    assert why == "config.ticks: 1 → 2"
    assert run(pipeline, "stages.pretrain.ticks=2", choice=choice)[0] == 0
    assert pieces.made == ["a", "b", "a", "b"]


def test_pieces_that_other_code_made_of_an_unfinished_stage_are_made_anew_on_request(
    pipeline: Path, pieces: Pieces, files: dict[str, str]
) -> None:
    pieces.broken.add("b")
    assert run(pipeline)[0] == 1
    files["config/schema.py"] = "2"
    pieces.broken.clear()
    assert run(pipeline, choice=Choice(on_code=True))[0] == 0
    assert pieces.made == ["a", "a", "b"]


def _with_other_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `curate` makes other bytes under its key."""
    original = Curate.run

    def other(self: Curate, context: Context) -> object:
        found = original(self, context)
        (context.out / "result.json").write_text(json.dumps({"other": "content"}))
        return found

    monkeypatch.setattr(Curate, "run", other)


CURATE_ALONE = Choice(only=("curate",), force=("curate",))


def test_pieces_of_an_earlier_input_are_made_anew_by_a_later_run(
    pipeline: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As students of a teacher that was made anew alone, while the stage of the students was not finished."""
    pieces.broken.add("b")
    assert run(pipeline)[0] == 1
    assert run(pipeline, choice=CURATE_ALONE)[0] == 0
    assert planned(pipeline)["pretrain"].fresh is False, "the same content"
    _with_other_content(monkeypatch)
    assert run(pipeline, choice=CURATE_ALONE)[0] == 0
    plan = planned(pipeline)["pretrain"]
    assert (plan.reasons, plan.fresh) == (("begun with an earlier curate, so it starts over",), True)
    assert run(pipeline)[0] == 1
    assert pieces.made == ["a", "a"]
    pieces.broken.clear()
    assert run(pipeline)[0] == 0
    assert pieces.made == ["a", "a", "b"], "what the new input gave is kept"
    assert pieces.numbers() == ["2", "3"]


def test_pieces_that_another_key_of_the_stage_made_of_an_earlier_input_are_made_anew(
    pipeline: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(pipeline)[0] == 0
    _with_other_content(monkeypatch)
    assert run(pipeline, choice=CURATE_ALONE)[0] == 0
    assert run(pipeline)[1].startswith("✓ Nothing to do"), "what is finished stays, with a note in `plan`"
    assert run(pipeline, "stages.pretrain.ticks=2")[0] == 0
    assert pieces.made == ["a", "b", "a", "b"]


def test_work_begun_with_an_earlier_input_starts_over(
    pipeline: Path, trace: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = "stages.pretrain.ticks=3"
    assert run(pipeline, ticks, "stages.pretrain.mode=fail")[0] == 1
    _with_other_content(monkeypatch)
    assert run(pipeline, ticks, choice=CURATE_ALONE)[0] == 0
    trace()
    assert run(pipeline, ticks)[0] == 0
    assert trace() == ["pretrain:0", "evaluate:0"]


def test_work_begun_with_an_input_that_is_mended_meanwhile_starts_over(
    pipeline: Path, trace: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damage shows when the input is read: the plan cannot know it."""
    ticks = "stages.pretrain.ticks=3"
    assert run(pipeline, ticks, "stages.pretrain.mode=fail")[0] == 1
    trace()
    _with_other_content(monkeypatch)
    (damaged,) = Path("runs/artifacts").glob("curate-*/result.json")
    damaged.write_text("##")
    assert run(pipeline, ticks)[0] == 0
    assert trace() == ["curate:0", "pretrain:0", "evaluate:0"]


# --- choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(last="pretrain"), ["run", "run", "left out"]),
        (Choice(only=("curate",)), ["run", "left out", "left out"]),
        (Choice(first="curate", last="pretrain"), ["run", "run", "left out"]),
    ],
)
def test_stages_are_chosen(pipeline: Path, choice: Choice, expected: list[str]) -> None:
    assert actions(pipeline, choice=choice) == expected


def test_what_is_left_out_is_read_if_it_is_there(pipeline: Path, trace: Traces) -> None:
    assert run(pipeline, choice=Choice(last="curate"))[0] == 0
    exit_code, said = run(pipeline, choice=Choice(only=("pretrain",)))
    assert (exit_code, trace()) == (0, ["curate:0", "pretrain:0"])
    assert "left out" in said
    exit_code, said = run(pipeline, choice=Choice(only=("pretrain",)))
    assert said.strip().startswith("✓ Nothing to do: pretrain is up to date.\n")
    assert run(pipeline, choice=Choice(first="pretrain"))[0] == 0
    assert trace() == ["evaluate:0"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(first="evaluate"), "needs the artifacts of 'pretrain', 'curate', which do not exist"),
        (Choice(first="evaluate"), "run them too: --until evaluate"),
        (Choice(only=("pretrian",)), "did you mean 'pretrain'?"),
        (Choice(first="evaluate", last="curate"), "these options together select no stage"),
        (Choice(only=("curate",), force=("pretrain",)), "is forced but not selected"),
        (Choice(force=("nothing",)), "there are: curate, pretrain, evaluate"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_runs(
    pipeline: Path, trace: Traces, choice: Choice, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(pipeline, choice=choice)
    assert expected in str(caught.value)
    assert trace() == []
