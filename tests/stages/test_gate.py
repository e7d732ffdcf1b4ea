"""Conditions before an alias, in a real MLflow database: what passes, what does not, and that it then rests."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

from orchestrator.stages.base import Context, PlanContext
from orchestrator.stages.common.scores import Scores
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.metric import Metric
from orchestrator.stages.publish.conditions import judge, parse
from orchestrator.stages.publish.config import Publish
from orchestrator.tracking.aliases import AliasedVersion
from orchestrator.tracking.rollback import rollback
from orchestrator.tracking.run import Tracking

from .registries import MAJORITY, RANDOM, RAW_PIXELS, Maker, attempt, content


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[str, Tracking]]:
    """One database for the module; each test has a pipeline of its own."""
    folder = tmp_path_factory.mktemp("gate")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    shutil.copyfile(empty_database, folder / "mlflow.db")
    with Tracking(uri, "gate", folder / "spool") as tracking:
        yield uri, tracking


Make = Callable[..., Context]


@pytest.fixture
def make(tracked: tuple[str, Tracking], tmp_path: Path, request: pytest.FixtureRequest) -> Make:
    """Makes what the stage gets: `make(0.4, seed=1)`."""
    pipeline = "".join(one for one in request.node.name.lower() if one.isalnum())[:60]
    run = tracked[1].run("publish")

    def make(accuracy: float, seed: int = 0, **more: Any) -> Context:
        return attempt(tmp_path, pipeline, run, accuracy, seed, **more)

    return make


def gated(*conditions: object) -> Publish:
    return Publish.model_validate({"kind": "publish", "conditions": list(conditions)})


def aliases(uri: str, now: Context) -> dict[str, int]:
    found: dict[str, int] = content(uri, f"{now.pipeline}-vit")["aliases"]
    return found


# --- one condition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("knn >= 0.5", True),
        ("knn > 0.5", False),
        ("knn <= 0.5", True),
        ("knn < 0.5", False),
        ("knn >= 0.5001", False),
        ("knn > 0.4999", True),
        ("knn <= 0.4999", False),
        ("knn < 0.5001", True),
        ("knn > raw_pixels", True),
        ("knn > random_weights", False),
        ("knn >= random_weights", True),
        ("knn < majority", False),
        ("rank >= 2", True),
        ("rank/rank >= 2", True),
        ("rank > random_weights", False),
        ("nothing >= 0", False),
        ("nothing <= 0", False),
        ("rank >= raw_pixels", False),
        ("rank < raw_pixels", False),
    ],
)
def test_a_condition_is_judged_as_it_is_written(text: str, passed: bool) -> None:
    baselines = {
        "raw_pixels": {"knn": 0.4},
        "random_weights": {"knn": 0.5, "rank": 2.5},
        "majority": {"knn": 0.2},
    }
    scores = Scores({"knn": 0.5, "rank": 2.0, "rank/rank": 2.0}, baselines)
    assert judge(parse(text), scores, 1, None).passed == passed
    assert not judge(parse(text), None, 1, None).passed, "what was not evaluated has reached nothing"


@pytest.mark.parametrize(
    ("text", "champion", "passed"),
    [
        ("knn >= champion", 0.4, True),
        ("knn >= champion", 0.5, True),
        ("knn >= champion", 0.6, False),
        ("knn > champion", 0.5, False),
        ("knn > champion", 0.4, True),
        ("knn <= champion", 0.4, False),
        ("knn < champion", 0.6, True),
    ],
)
def test_the_champions_figure_is_the_one_on_record(text: str, champion: float, passed: bool) -> None:
    tags = {"orchestrator.gate.metrics": json.dumps({"knn": champion}), "orchestrator.knn_accuracy": "0.9999"}
    assert judge(parse(text), Scores({"knn": 0.5}), 2, AliasedVersion(1, tags)).passed == passed
    assert judge(parse(text), Scores({"knn": 0.5}), 2, None).passed, "there is nothing to reach yet"
    assert judge(parse(text), Scores({"knn": 0.5}), 1, AliasedVersion(1, tags)).passed, (
        "it was decided when it got the alias"
    )


def test_a_champion_of_an_earlier_version_has_a_rounded_figure() -> None:
    old = AliasedVersion(1, {"orchestrator.knn_accuracy": "0.4123"})
    assert judge(parse("knn >= champion"), Scores({"knn": 0.41229}), 2, old).passed
    assert not judge(parse("knn >= champion"), Scores({"knn": 0.41224}), 2, old).passed
    found = judge(parse("miou >= champion"), Scores({"knn": 0.4, "miou": 0.9}), 2, old)
    assert not found.passed
    assert "miou of version 1, which has the alias, is not on record" in found.why
    for damaged in ("{", "[]", '{"knn": "x"}', '{"knn": null}'):
        holder = AliasedVersion(1, {"orchestrator.gate.metrics": damaged})
        assert not judge(parse("knn >= champion"), Scores({"knn": 0.4}), 2, holder).passed


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("knn>=0.40", "knn >= 0.4"),
        ("  knn  >  champion ", "knn > champion"),
        ({"beats": "raw_pixels"}, "knn > raw_pixels"),
        ("my metric/a figure <= 1e-3", "my metric/a figure <= 0.001"),
    ],
)
def test_a_condition_has_one_spelling(written: object, kept: str) -> None:
    assert gated(written).conditions == (kept,)
    assert Publish.model_validate({"kind": "publish", "conditions": written}).conditions == (kept,)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("knn", "is not a condition"),
        ("knn => 0.4", "is not a condition"),
        ("knn == 0.4", "is not a condition"),
        ("0.3 < knn < 0.4", "is not a condition"),
        (">= 0.4", "is not a condition"),
        ("knn >= champoin", "did you mean champion"),
        ("knn >= half", "there are champion, raw_pixels"),
        ("knn >= nan", "is not a number"),
        ({"beats": "raw_pixel"}, "did you mean raw_pixels"),
        ({"beat": "raw_pixels"}, "is not a condition"),
        ({"beats": 0.4}, "is not a condition"),
        (0.4, "is not a condition"),
        (True, "is not a condition"),
    ],
)
def test_what_is_no_condition_is_refused(wrong: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        gated(wrong)


def test_the_alias_of_challengers_is_taken() -> None:
    with pytest.raises(ValidationError, match="use another alias"):
        Publish.model_validate({"kind": "publish", "alias": "challenger", "conditions": ["knn >= 0.4"]})
    assert Publish(kind="publish", alias="challenger").alias == "challenger", (
        "without a gate it is a name like others"
    )


# --- a registry ---------------------------------------------------------------------------------------------------


def published(stage: Publish, uri: str, now: Context) -> Mapping[str, float]:
    """Publish, and see that this is then all that there is to do."""
    figures = stage.run(now)
    before = content(uri, f"{now.pipeline}-vit")
    assert stage.drift(now, uri) == []
    stage.run(now)
    assert content(uri, f"{now.pipeline}-vit") == before, "a second run changes nothing"
    return figures


def test_the_alias_moves_only_to_what_is_as_good(tracked: tuple[str, Tracking], make: Make) -> None:
    uri, stage = tracked[0], gated("knn >= champion", {"beats": "raw_pixels"})
    first, worse, equal, better = make(0.5), make(0.45, 1), make(0.5, 2), make(0.55, 3)
    assert published(stage, uri, first)["with_alias"] == 1
    assert aliases(uri, first) == {"champion": 1}
    figures = published(stage, uri, worse)
    assert figures == {
        "published": 1, "with_alias": 0, "challengers": 1, "conditions_passed": 1, "conditions_failed": 1,
    }  # fmt: skip
    assert aliases(uri, first) == {"champion": 1, "challenger": 2}
    published(stage, uri, equal)
    assert aliases(uri, first) == {"champion": 3, "challenger": 2}
    published(stage, uri, better)
    assert aliases(uri, first) == {"champion": 4, "challenger": 2}
    # The first file once more: what was champion is not as good as what is now.
    assert stage.drift(first, uri) == [f"{first.pipeline}-vit version 1 does not have the alias challenger"]
    published(stage, uri, first)
    assert aliases(uri, first) == {"champion": 4, "challenger": 1}
    strict = gated("knn > champion")
    published(strict, uri, make(0.55, 5))
    assert aliases(uri, first)["champion"] == 4, "it is not better"


def test_what_passed_and_what_did_not_is_told(
    tracked: tuple[str, Tracking], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    uri, stage = tracked[0], gated("knn >= 0.4", {"beats": "raw_pixels"}, {"beats": "random_weights"})
    now = make(0.42)
    with caplog.at_level(logging.INFO, "orchestrator"):
        stage.run(now)
    name = f"{now.pipeline}-vit"
    said = [
        record.getMessage()
        for record in caplog.records
        if name in record.getMessage() or ": " in record.getMessage()
    ]
    passed = "knn >= 0.4: passed, knn is 0.42"
    failed = f"knn > raw_pixels: not passed, knn is 0.42, of raw_pixels {RAW_PIXELS}"
    third = f"knn > random_weights: passed, knn is 0.42, of random_weights {RANDOM}"
    assert [line.strip() for line in said if "knn" in line or "conditions" in line] == [
        f"{name} version 1 is challenger: 2 of 3 conditions passed", passed, failed, third,
    ]  # fmt: skip
    levels = [record.levelno for record in caplog.records if "knn" in record.getMessage()]
    assert levels == [logging.INFO, logging.WARNING, logging.INFO]
    assert all(
        getattr(record, "kept", False)
        for record in caplog.records
        if "passed, " in record.getMessage() and record.levelno == logging.INFO
    )

    tags = content(uri, name)["versions"][1]
    assert {key: value for key, value in tags.items() if ".gate." in key} == {
        "orchestrator.gate.1": passed,
        "orchestrator.gate.2": failed,
        "orchestrator.gate.3": third,
        "orchestrator.gate.result": "not passed",
        "orchestrator.gate.metrics": '{"knn": 0.42}',
    }
    (entry,) = json.loads((now.work / "published.json").read_text())
    assert (entry["standing"], entry["conditions"]) == ("challenger", [passed, failed, third])
    assert aliases(uri, now) == {"challenger": 1}
    # Other conditions are another key, so the stage runs: the tags are those of the file of now.
    published(gated({"beats": "majority"}), uri, now)
    tags = content(uri, name)["versions"][1]
    assert {key for key in tags if ".gate." in key} == {
        f"orchestrator.gate.{part}" for part in ("1", "result", "metrics")
    }
    assert tags["orchestrator.gate.1"] == f"knn > majority: passed, knn is 0.42, of majority {MAJORITY}"
    assert aliases(uri, now) == {"champion": 1}, "it is not a challenger any more"


def test_a_champion_that_no_longer_passes_keeps_its_alias(
    tracked: tuple[str, Tracking], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    uri, now = tracked[0], make(0.42)
    published(gated(), uri, now)
    published(gated("knn >= 0.9"), uri, now)
    assert aliases(uri, now) == {"champion": 1}
    assert f"{now.pipeline}-vit version 1 keeps champion: 0 of 1 conditions passed" in caplog.text
    forced = make(0.43, 1)
    assert published(gated("knn >= 0.9"), uri, forced)["challengers"] == 1
    gated("knn >= 0.9").run(replace(forced, forced=True))
    assert aliases(uri, now) == {"champion": 2}
    tags = content(uri, f"{now.pipeline}-vit")["versions"][2]
    assert tags["orchestrator.gate.result"] == "not passed, and forced"
    published(gated("knn >= 0.9"), uri, forced)
    assert aliases(uri, now) == {"champion": 2}


def test_what_beat_the_champion_stays_on_record(tracked: tuple[str, Tracking], make: Make) -> None:
    uri, stage, now = tracked[0], gated("knn >= champion"), make(0.6, 1)
    stage.run(make(0.5))
    stage.run(now)
    tags = content(uri, f"{now.pipeline}-vit")["versions"][2]
    assert tags["orchestrator.gate.1"] == "knn >= champion: passed, knn is 0.6, of version 1 0.5"


def test_metrics_of_users_packages_are_conditions_too(tracked: tuple[str, Tracking], make: Make) -> None:
    uri, stage = tracked[0], gated("rank >= champion", "rank > random_weights")
    first = make(0.5, measured={"rank": 4.0})
    stage.run(first)
    stage.run(make(0.6, 1, measured={"rank": 3.5}))
    assert aliases(uri, first) == {"champion": 1, "challenger": 2}
    stage.run(make(0.4, 2, measured={"rank": 4.5}))
    assert aliases(uri, first) == {"champion": 3, "challenger": 2}
    # A metric of several figures is named with one of them.
    several = make(0.4, 3, measured={"rank": 9.0, "share": 0.1})
    gated("rank >= 1").run(several)
    assert content(uri, f"{first.pipeline}-vit")["versions"][4]["orchestrator.gate.1"] == (
        "rank >= 1: not passed, the evaluation has no rank of this model; did you mean rank/rank?"
    )


def test_without_conditions_the_registry_has_what_it_had(tracked: tuple[str, Tracking], make: Make) -> None:
    uri, stage, first, second = tracked[0], Publish(kind="publish"), make(0.5), make(0.4, 1)
    assert published(stage, uri, first) == {"published": 1.0}
    published(stage, uri, second)
    published(stage, uri, first)
    found = content(uri, f"{first.pipeline}-vit")
    assert (found["aliases"], sorted(found["versions"])) == ({"champion": 1}, [1, 2])
    assert found["tags"]["orchestrator.history.champion"] == "1 2 1"
    marks = {key for tags in found["versions"].values() for key in tags if ".gate." in key}
    assert marks == {"orchestrator.gate.metrics"}
    assert "conditions" not in Publish(kind="publish").identity(), "keys are as they were"


def test_what_was_rolled_back_stays_so(
    tracked: tuple[str, Tracking], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    uri, stage = tracked[0], gated("knn >= champion")
    first, second, third = make(0.5), make(0.6, 1), make(0.55, 2)
    name = f"{first.pipeline}-vit"
    published(stage, uri, first)
    published(stage, uri, second)
    done = rollback(name, uri)
    assert (done.before, done.now) == (2, 1)
    before = content(uri, name)
    assert stage.drift(second, uri) == []
    assert f"{name} version 2 was rolled back, and version 1 keeps the alias champion" in caplog.text
    assert "orchestrator publish FILE --force" in caplog.text
    published(stage, uri, second)
    assert content(uri, name)["aliases"] == before["aliases"] == {"champion": 1}
    # Another version is compared with the one that has the alias now.
    published(stage, uri, third)
    assert aliases(uri, first) == {"champion": 3}
    published(stage, uri, second)
    assert aliases(uri, first) == {"champion": 3}, "it is better, and it was rolled back"
    stage.run(replace(second, forced=True))
    assert aliases(uri, first) == {"champion": 2}
    published(stage, uri, second)
    assert "orchestrator.gate.rolled_back.champion" not in content(uri, name)["versions"][2]
    assert rollback(name, uri).now == 3


def test_a_version_that_was_deleted_is_no_champion(tracked: tuple[str, Tracking], make: Make) -> None:
    uri, stage, first, second = tracked[0], gated("knn >= champion"), make(0.5), make(0.4, 1)
    stage.run(first)
    MlflowClient(uri, uri).delete_model_version(f"{first.pipeline}-vit", "1")
    stage.run(second)
    assert aliases(uri, first)["champion"] == 2


# --- before anything runs -----------------------------------------------------------------------------------------


class Miou(Metric):
    use: str = "package:miou"


def planned(stage: Publish, evaluate: Evaluate | None, **makers: Maker) -> list[str]:
    """What is said of a stage before anything runs, a line a mistake."""
    upstream = {**makers, **({"evaluation": evaluate} if evaluate is not None else {})}
    names = {role: role.removeprefix("models_") for role in upstream}
    found = stage.preflight(PlanContext(upstream, names=names))
    return [f"{error.where}: {error.what} | {error.hint}" for error in found]


def evaluate(*needs: str) -> Evaluate:
    made = Evaluate.model_validate({"kind": "evaluate", "needs": list(needs)})
    return made.model_copy(update={"metrics": (Miou(name="miou"),)})


def test_conditions_that_no_evaluation_can_decide_are_named() -> None:
    students = Maker(kind="distill", made={"vit": "students/vit/model"})
    texts = Maker(kind="align_text", made={"": "aligned"})
    assert (
        planned(
            gated("knn >= 0.4", "miou >= 0.3", "miou/one >= 0.2"), evaluate("students"), students=students
        )
        == []
    )
    (said,) = planned(gated("knn >= 0.4"), None, students=students)
    assert said.startswith("needs: the condition `knn >= 0.4` needs an evaluation")
    (said,) = planned(gated("knn >= 0.4"), evaluate("pretrain"), students=students)
    assert "does not evaluate the stage 'students'" in said
    assert "add students to the `needs` of evaluation" in said
    (said,) = planned(gated("kn >= 0.4"), evaluate("students"), students=students)
    assert said.endswith("no 'kn' of 'vit' (distill) | did you mean 'knn'?")
    (said,) = planned(gated("accuracy >= 0.4"), evaluate("students"), students=students)
    assert said.endswith("there are knn, miou")
    (said,) = planned(gated("miou > raw_pixels"), evaluate("students"), students=students)
    assert "computes no 'miou' of raw_pixels" in said
    assert planned(gated("miou > random_weights"), evaluate("students"), students=students) == []

    both = {"students": students, "models_text": texts}
    (said,) = planned(gated("knn >= 0.4"), evaluate("students", "text"), **both)
    assert "no 'knn' of 'text' (align_text)" in said
    named = Publish(kind="publish", names="vit", conditions=("knn >= 0.4",))
    assert planned(named, evaluate("students", "text"), **both) == []
    named = Publish(kind="publish", names="text", conditions=("zero_shot >= 0.4",))
    assert planned(named, evaluate("students", "text"), **both) == []
    (said,) = planned(gated(), evaluate("students"))
    assert said.startswith("needs: there is no model to publish")
