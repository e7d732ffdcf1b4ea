"""The way back of an alias, in a real MLflow database: to the version that had it, and to no other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_line import command_line

from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS
from orchestrator.tracking import model_files, registry
from orchestrator.tracking.aliases import OPEN, Decision, Gate
from orchestrator.tracking.rollback import rollback
from orchestrator.tracking.run import SpooledRun, Tracking

from .test_publish_faults import model


@pytest.fixture
def run(start: Callable[[], Tracking]) -> SpooledRun:
    return start().run("food")


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri, uri)


def publish(run: SpooledRun, folder: Path, number: int, gate: Gate = OPEN, name: str = "vit") -> int:
    """Publish the model of this number."""
    place = folder / f"model-{number}"
    made = place if place.exists() else model(place, float(number))
    return registry.publish(run, name, made, {"number": str(number)}, "champion", gate=gate)


def champion(client: MlflowClient) -> int:
    return int(client.get_registered_model("vit").aliases["champion"])


def test_back_step_by_step_over_the_versions_that_had_it(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    for number in (1, 2, 1, 3):
        publish(run, tmp_path, number)
    assert champion(client) == 3
    steps = []
    for _ in range(3):
        done = rollback("vit", uri)
        steps.append((done.before, done.now))
        assert champion(client) == done.now
    assert steps == [(3, 1), (1, 2), (2, 1)]
    with pytest.raises(UserError, match="back at version 1, the first one on record") as caught:
        rollback("vit", uri)
    assert "one of 1, 2, 3" in (caught.value.hint or "")
    assert champion(client) == 1


def test_back_to_a_version_by_its_number(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    for number in (1, 2, 3, 4):
        publish(run, tmp_path, number)
    assert rollback("vit", uri, to=2).before == 4
    assert (champion(client), client.get_registered_model("vit").tags["orchestrator.history.champion"]) == (
        2,
        "1 2",
    )
    # Forward again, to what is no longer on the way back.
    assert rollback("vit", uri, to=3).before == 2
    assert client.get_registered_model("vit").tags["orchestrator.history.champion"] == "1 2 3"
    assert rollback("vit@champion", uri).now == 2
    with pytest.raises(UserError, match="is version 2 already"):
        rollback("vit", uri, to=2)
    with pytest.raises(UserError, match="no version 9") as caught:
        rollback("vit", uri, to=9)
    assert caught.value.hint == "there are 1, 2, 3, 4"


def test_publishing_again_leaves_a_rollback_alone(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    told: list[Decision] = []
    for number in (1, 2):
        publish(run, tmp_path, number)
    rollback("vit", uri)
    tags = client.get_model_version("vit", "2").tags
    assert tags["orchestrator.gate.rolled_back.champion"].startswith("to version 1, 20")
    assert publish(run, tmp_path, 2, Gate(told=told.append)) == 2
    assert (champion(client), [one.standing for one in told]) == (1, ["rolled back"])
    content = model_files.content_digest(
        {path.name: DIGESTS.of(path) for path in (tmp_path / "model-2").iterdir()}
    )
    assert registry.difference(uri, "vit", content, {"number": "2"}, "champion") is None

    assert publish(run, tmp_path, 3) == 3, "another version is another matter"
    assert champion(client) == 3
    publish(run, tmp_path, 2)
    assert champion(client) == 3
    publish(run, tmp_path, 2, Gate(forced=True))
    assert champion(client) == 2
    assert "orchestrator.gate.rolled_back.champion" not in client.get_model_version("vit", "2").tags
    # What was taken away under one alias may have another.
    rollback("vit", uri)
    registry.publish(run, "vit", tmp_path / "model-2", {"number": "2"}, "candidate")
    assert client.get_registered_model("vit").aliases == {"champion": 3, "candidate": 2}


def test_who_had_it_is_not_guessed(run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path) -> None:
    publish(run, tmp_path, 1)
    with pytest.raises(UserError, match="no move of vit@champion") as caught:
        rollback("vit", uri)
    assert (
        caught.value.hint
        == "version 1 is its only one: there is none to go back to until the next is published"
    )
    publish(run, tmp_path, 2)
    publish(run, tmp_path, 3)
    client.set_registered_model_alias("vit", "champion", "1")
    with pytest.raises(UserError, match="moved to version 1 by another program"):
        rollback("vit", uri)
    assert champion(client) == 1
    assert rollback("vit", uri, to=2).before == 1
    client.delete_model_version("vit", "1")
    with pytest.raises(UserError, match="no version 1 any more"):
        rollback("vit", uri)
    assert champion(client) == 2


def test_an_alias_that_was_moved_elsewhere_is_on_record_with_the_next_move(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        publish(run, tmp_path, number)
    client.set_registered_model_alias("vit", "champion", "1")
    publish(run, tmp_path, 4)
    assert client.get_registered_model("vit").tags["orchestrator.history.champion"] == "1 2 3 1 4"
    assert rollback("vit", uri).now == 1


def test_the_command_says_from_where_to_where(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    for number in (1, 2, 3):
        publish(run, tmp_path, number)
    code, said = command_line("rollback", "vit", "--tracking", uri, toy=False)
    assert (code, champion(client)) == (0, 2)
    assert "vit@champion was version 3 and is version 2" in said
    code, said = command_line("rollback", "vit", "--to", "1", "--tracking", uri, toy=False)
    assert (code, champion(client)) == (0, 1)
    code, said = command_line("rollback", "vit", "--tracking", uri, toy=False)
    assert (code, champion(client)) == (2, 1)
    assert "the first one on record" in said
    assert "--to VERSION" in said
    assert "Traceback" not in said
    for name, options, what, hint in (
        ("vitt", {}, "no model 'vitt'", "did you mean vit"),
        ("vit", {"alias": "prod"}, "vit has no alias 'prod'", "there is vit@champion"),
        ("vit@prod", {}, "vit has no alias 'prod'", "there is vit@champion"),
        ("vit:2", {}, "'vit:2' does not name a model and one alias", "vit@ALIAS, and --to VERSION"),
        ("vit@", {}, "'vit@' does not name a model and one alias", "vit@ALIAS"),
        ("vit@champion", {"alias": "prod"}, "does not name a model and one alias", "vit@ALIAS"),
        ("vit", {"to": 7}, "vit has no version 7", "there are 1, 2, 3"),
        ("vit", {"to": 1}, "is version 1 already", "there are 1, 2, 3"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            rollback(name, uri, **options)  # type: ignore[arg-type]
        assert hint in (caught.value.hint or "")
    assert champion(client) == 1


def test_a_registry_that_is_not_there_is_one_error(uri: str, tmp_path: Path) -> None:
    nowhere = f"sqlite:///{tmp_path}/none.db"
    with pytest.raises(UserError, match="no MLflow database"):
        rollback("vit", nowhere)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UserError, match="no model 'vit'") as caught:
        rollback("vit", uri)
    assert caught.value.hint == "nothing is published there yet"
    Path(uri.removeprefix("sqlite:///")).write_bytes(b"garbage" * 1000)
    with pytest.raises(UserError, match="the registry cannot be reached"):
        rollback("vit", uri)
