"""`orchestrator verify`, a store that was moved, and records that are damaged, by the real command line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import toys
from command_line import command_line
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.pipeline.check.doctor import _store as store_row
from orchestrator.pipeline.load import load
from orchestrator.pipeline.maintenance.verify import verify
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.pipeline.tracking import tracking_run
from orchestrator.storage.local import LocalStore
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.store import Store
from orchestrator.training.checkpoint.format import COMMIT, FORMAT, shard_name
from orchestrator.training.checkpoint.inspect import describe_all

MAIN = Path(__file__).with_name("toy_main.py")
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("TOY_TRACKING", "recorded")
    monkeypatch.setenv("TOY_TRACE", "trace")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def run(*arguments: str) -> tuple[int, str]:
        code, said = command_line(*arguments)
        assert "Traceback" not in said, said
        return code, said

    return run


@pytest.fixture
def own_process(command: Command) -> Command:
    """The same in a process of its own."""

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(MAIN), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stdout, done.stdout
        return done.returncode, done.stdout

    return run


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.cluster)])
def store(request: pytest.FixtureRequest, pipeline: Path, command: Command) -> Store:
    """A store in which the toy pipeline ran."""
    if request.param == "local":
        store: Store = LocalStore("runs")
    else:
        store = S3Store(request.getfixturevalue("s3_uri"))
        pipeline.write_text(pipeline.read_text().replace("store: runs/", f"store: {store.uri}"))
    assert command("run", "toy.yaml")[0] == 0
    return store


def ran() -> list[str]:
    lines = Path("trace").read_text().splitlines() if Path("trace").exists() else []
    Path("trace").unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def name_of(store: Store, kind: str, file: str) -> str:
    return next(name for name in store.list(f"artifacts/{kind}-") if name.endswith(file))


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_pipe, make_loop])
def test_pipes_and_loops_in_a_store_are_damage_and_no_command_waits_for_them(
    pipeline: Path, command: Command, make: Callable[[Path], None]
) -> None:
    assert command("run", "toy.yaml")[0] == 0
    record = max(path for path in Path("runs/ledger/toy").iterdir() if '"done"' in path.read_text())
    (manifest,) = Path("runs").glob("artifacts/curate-*/manifest.json")
    (result,) = Path("runs").glob("artifacts/pretrain-*/result.json")
    for path in (record, manifest, result):
        path.unlink()
        make(path)
    code, said = command("verify", "toy.yaml")
    assert code == 1
    for path in (record, manifest, result):
        assert f"✗ {path.relative_to('runs')}: not a regular file" in said
    code, said = command("status", "toy.yaml")
    assert (code, f"{record.relative_to('runs')} in store" in said) == (0, True), said
    code, said = command("plan", "toy.yaml")
    assert code == 0, said
    code, said = command("run", "toy.yaml")
    assert code == 0, said
    assert json.loads(manifest.read_text())["kind"] == "curate"
    assert result.is_file()
    assert command("verify", "toy.yaml")[1].count("✗") == 2, "the record stays where it is"


def test_a_whole_store_and_every_kind_of_damage(store: Store, command: Command, folder: Path) -> None:
    code, said = command("verify", store.uri)
    assert (code, said.count("\n")) == (0, 1), said
    assert re.search(r"all \d+ artifacts, checkpoints and records in .* are whole", said)
    assert command("verify", "toy.yaml")[0] == 0

    flipped = name_of(store, "pretrain", "result.json")
    store.put_bytes(flipped, b"!" * len(store.get_bytes(flipped)))
    empty = name_of(store, "curate", "manifest.json")
    store.put_bytes(empty, json.dumps(json.loads(store.get_bytes(empty)) | {"files": {}}).encode())
    surplus = name_of(store, "evaluate", "manifest.json").replace("manifest.json", "extra")
    store.put_bytes(surplus, b"extra")
    event = next(iter(store.list("ledger/toy/")))
    store.put_bytes(event, store.get_bytes(event)[:20])
    store.put_bytes(f"holds/x.{'a' * 32}.door", b"garbage")
    store.put_bytes("artifacts/pretrain-0123456789abcdef/model", b"a run that died")
    shard = put_checkpoint(store, "work/pretrain-1/checkpoints/step-00000003/")
    store.put_bytes(shard, b"other")
    for target in (store.uri, "toy.yaml"):
        code, said = command("verify", target)
        assert code == 1
        for name, what in (
            (flipped, "content differs"),
            (empty, "lists no files"),
            (surplus, "is not in the manifest"),
            (event, "EOF"),
            ("holds/x.", "has no valid owner"),
            (shard, "differs from its sha256"),
        ):
            assert [line for line in said.splitlines() if "✗" in line and name in line and what in line], said
        assert "! artifacts/pretrain-0123456789abcdef/ was never finished" in said
        assert re.search(
            r"✗ damaged in .*: 3 of 3 artifacts, 1 of 1 checkpoints, 1 of \d+ ledger records, 1 of \d+ holds\. "
            "A run that needs a damaged artifact makes it again",
            said.splitlines()[-1],
        )


def test_a_run_is_no_cure_for_a_damaged_record(folder: Path) -> None:
    LocalStore("runs").put_bytes("ledger/toy/00000000.json", b"{")
    output = io.StringIO()
    assert not verify(Console(file=output, width=200), "runs")
    last = output.getvalue().splitlines()[-1]
    assert last.startswith("✗ damaged in ")
    assert last.endswith("/runs: 1 of 1 ledger records.")


def put_checkpoint(store: Store, prefix: str) -> str:
    import hashlib

    shard = shard_name("a0001", 0, 1)
    entry = {"size": 5, "sha256": hashlib.sha256(b"shard").hexdigest()}
    manifest = {
        "format": FORMAT, "step": 3, "updates": 3, "num_workers": 1, "token": "a0001", "keys": {},
        "files": {shard: entry},
    }  # fmt: skip
    store.put_bytes(prefix + shard, b"shard")
    store.put_bytes(prefix + COMMIT, json.dumps(manifest).encode())
    return prefix + shard


def test_damage_is_mended_by_a_run_that_reads_it(store: Store, command: Command) -> None:
    ran()
    name = name_of(store, "pretrain", "result.json")
    whole = store.get_bytes(name)
    store.put_bytes(name, b"!" * len(whole))
    if store.remote:
        shutil.rmtree(os.environ["ORCHESTRATOR_CACHE"])
    code, said = command("run", "toy.yaml", "stages.evaluate.ticks=2")
    assert (code, ran()) == (0, ["pretrain", "evaluate"])
    assert "the artifact of pretrain is damaged and is made again: artifacts/pretrain-" in said
    assert store.get_bytes(name) == whole
    assert command("verify", store.uri)[0] == 0


def test_a_damaged_copy_of_a_whole_artifact_is_fetched_again(
    command: Command, pipeline: Path, s3_uri: str
) -> None:
    pipeline.write_text(pipeline.read_text().replace("store: runs/", f"store: {s3_uri}"))
    command("run", "toy.yaml")
    ran()
    [copy] = S3Store(s3_uri).root.glob("artifacts/pretrain-*/result.json")
    whole = copy.read_bytes()
    copy.write_bytes(b"!" * len(whole))
    (copy.parent / "surplus").write_text("surplus")
    code, _ = command("run", "toy.yaml", "stages.evaluate.ticks=2")
    assert (code, ran()) == (0, ["evaluate"])
    assert copy.read_bytes() == whole
    assert not (copy.parent / "surplus").exists()


@pytest.mark.parametrize("target", ["none", "none.yaml"])
def test_what_is_not_there_is_a_mistake_and_stays_so(command: Command, target: str) -> None:
    code, said = command("verify", target)
    assert code == 2
    assert "there is no pipeline file and no store" in said
    assert not Path(target).exists()
    code, said = command("verify", "toy.yaml")
    assert code == 2
    assert "never ran" in said
    assert not Path("runs").exists()


def test_no_command_stumbles_over_a_damaged_or_later_event(command: Command) -> None:
    command("run", "toy.yaml")
    events = sorted(Path("runs/ledger/toy").glob("*.json"))
    events[1].write_text(events[1].read_text()[:30])
    events[2].write_text(json.dumps(json.loads(events[2].read_text()) | {"mood": "fine"}))
    events[3].write_text('{"format": 9}')
    for arguments in (["plan"], ["status"], ["logs"], ["run"], ["resume"]):
        code, said = command(arguments[0], "toy.yaml", *(["pretrain"] if arguments == ["logs"] else []))
        assert code == 0, said
        if arguments != ["logs"]:
            assert said.count(events[1].name) == said.count(events[3].name) == 1, said


@pytest.mark.cluster
def test_a_store_in_another_folder_works_and_leaves_the_old_one_alone(
    own_process: Command, pipeline: Path
) -> None:
    own_process("run", "toy.yaml")
    ran()
    shutil.copytree("runs", "elsewhere")
    Path("runs").rename("gone")
    Path("runs").touch()  # whoever goes there stumbles
    pipeline.write_text(pipeline.read_text().replace("store: runs/", "store: elsewhere"))
    assert own_process("plan", "toy.yaml")[1].count("nothing changed") == 3
    assert "up to date" in own_process("run", "toy.yaml")[1]
    assert own_process("run", "toy.yaml", "stages.evaluate.ticks=2")[0] == 0
    assert ran() == ["evaluate"]
    assert own_process("verify", "elsewhere")[0] == 0
    assert "tick 1 of 1" in own_process("logs", "toy.yaml", "pretrain")[1]


@pytest.mark.long
def test_a_store_in_another_bucket_works_and_leaves_the_old_one_alone(
    command: Command, pipeline: Path, s3_uri: str, tmp_path: Path
) -> None:
    old, new = S3Store(f"{s3_uri}/old"), S3Store(f"{s3_uri}/new")
    pipeline.write_text(pipeline.read_text().replace("store: runs/", f"store: {old.uri}"))
    command("run", "toy.yaml")
    ran()
    for name in list(old.list()):
        old.get_file(name, tmp_path / "object")
        new.put_file(name, tmp_path / "object")
        old.delete(name)
    shutil.rmtree(os.environ["ORCHESTRATOR_CACHE"])
    pipeline.write_text(pipeline.read_text().replace(old.uri, new.uri))
    assert command("plan", "toy.yaml")[1].count("nothing changed") == 3
    assert "up to date" in command("run", "toy.yaml")[1]
    assert command("run", "toy.yaml", "stages.evaluate.ticks=2")[0] == 0
    assert ran() == ["evaluate"]
    assert list(old.list()) == []


def test_mlflows_database_is_told_of_the_other_bucket(pipeline: Path, s3_uri: str) -> None:
    pipeline.write_text(
        pipeline.read_text().replace(
            "store: runs/", f"store: {s3_uri}\ntracking: {{uri: 'sqlite:///mlflow.db'}}"
        )
    )
    with sqlite3.connect("mlflow.db") as database:
        database.execute("create table experiments (name text, artifact_location text)")
        database.execute("insert into experiments values ('toy', 's3://old/place/mlartifacts')")
    loaded = load(pipeline, stage_type=toys.ToyStage)

    def location() -> str:
        with sqlite3.connect("mlflow.db") as database:
            return str(database.execute("select artifact_location from experiments").fetchone()[0])

    tracking_run.send_leftovers(loaded, Workspace(s3_uri))
    assert location() == "s3://old/place/mlartifacts", "a new, empty store is not a copy"
    S3Store(s3_uri).put_bytes("mlartifacts/run/artifacts/x", b"x")
    tracking_run.send_leftovers(loaded, Workspace(s3_uri))
    assert location() == f"{s3_uri}/mlartifacts"


@pytest.mark.parametrize("target", ["~no-such-user-here/x", "a" * 300])
def test_a_path_that_no_file_can_have_is_one_error(target: str) -> None:
    with pytest.raises(UserError, match="the path cannot be used"):
        verify(Console(), target)
    with pytest.raises(UserError, match="the path cannot be used"):
        describe_all(Path(target))
    fine, _, said = store_row(target)
    assert fine is False
    assert "the path cannot be used" in said


def test_what_a_later_version_holds_is_no_damage(folder: Path) -> None:
    LocalStore("runs").put_bytes(f"holds/x.{'a' * 32}.door", b'{"format": 2}')
    output = io.StringIO()
    assert verify(Console(file=output, width=300), "runs")
    assert "was not compared: a later version of orchestrator holds this" in output.getvalue()
