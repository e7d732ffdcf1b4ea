"""What no ledger needs is found and deleted, and nothing else, on disk and in a bucket."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import toys
from driving import content, planned, run
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.pipeline.load import load
from orchestrator.pipeline.maintenance.gc import collect, orphans
from orchestrator.pipeline.maintenance.status import print_status
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import Context
from orchestrator.storage.local import LocalStore

from .conftest import PIPELINE


def gc(path: Path, *overrides: str, delete: bool = False) -> str:
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    output = io.StringIO()
    console = Console(file=output, width=200)
    collect(console, loaded, resolve(loaded, content), delete=delete)
    return output.getvalue()


def folders() -> set[str]:
    return {
        f"{place}/{path.name}" for place in ("artifacts", "work") for path in Path("runs", place).glob("*")
    }


def kinds(names: set[str]) -> list[str]:
    return sorted(name.rpartition("-")[0] for name in names)


def test_a_fresh_store_has_no_orphans(pipeline: Path) -> None:
    assert "no store yet" in gc(pipeline)
    run(pipeline)
    assert "Everything in the store is needed." in gc(pipeline, delete=True)
    assert kinds(folders()) == ["artifacts/curate", "artifacts/evaluate", "artifacts/pretrain"]


def test_what_other_settings_left_behind_is_listed_and_deleted_only_when_asked(pipeline: Path) -> None:
    run(pipeline)
    kept = folders()
    run(pipeline, "stages.pretrain.ticks=4", "stages.pretrain.mode=fail")
    for ticks in (2, 3):
        run(pipeline, f"stages.pretrain.ticks={ticks}")
    run(pipeline)
    before = folders()
    said = gc(pipeline)
    assert "4 artifacts and 1 folder of unfinished work that no ledger needs" in said
    assert "Nothing was deleted" in said
    assert folders() == before
    said = gc(pipeline, "stages.pretrain.ticks=2", delete=True)
    assert "2 artifacts and 1 folder" in said, "what the file would use is needed too"
    assert len(folders() - kept) == 2
    assert "Deleted" in gc(pipeline, delete=True)
    assert folders() == kept
    assert {item.action for item in planned(pipeline).values()} == {"cached"}


def status(path: Path, *overrides: str) -> str:
    output = io.StringIO()
    print_status(Console(file=output, width=200), load(path, overrides, stage_type=toys.ToyStage))
    return output.getvalue()


def test_status_names_the_stages_that_ran_with_other_settings(pipeline: Path) -> None:
    run(pipeline)
    assert "other settings" not in status(pipeline)
    run(pipeline, "stages.pretrain.ticks=2")
    assert "other settings" not in status(pipeline, "stages.pretrain.ticks=2")
    said = status(pipeline)
    assert "! Run with other settings than these: pretrain, evaluate." in said
    (line,) = [line for line in said.splitlines() if line.startswith("  pretrain: ")]
    assert re.fullmatch(r"  pretrain: config\.ticks: 2 → \d+", line), line
    assert "  evaluate: " not in said, "what changed for it is what it reads"


@pytest.mark.parametrize("text", ['{"format": 9}', '{"time": 1.0, "eve'], ids=["later", "damaged"])
def test_nothing_is_deleted_while_a_record_cannot_be_read(pipeline: Path, text: str) -> None:
    """Such as the one that says what another pipeline, or a later version, has made."""
    run(pipeline, "name=other", "stages.pretrain.ticks=2")
    run(pipeline)
    before = folders()
    for path in Path("runs/ledger/other").glob("*.json"):
        if "pretrain" in path.read_text():
            path.write_text(text)
    for delete in (False, True):
        with pytest.raises(
            UserError, match="2 records cannot be read, so it is unknown which artifacts are needed"
        ) as caught:
            gc(pipeline, delete=delete)
        assert "ledger/other/" in str(caught.value.where)
        assert folders() == before
    assert "! 2 records cannot be read, so it is unknown which artifacts are needed (ledger/other/" in status(
        pipeline
    )


@pytest.mark.parametrize("needed", [True, False])
def test_nothing_is_deleted_while_a_manifest_is_of_a_later_version(pipeline: Path, needed: bool) -> None:
    run(pipeline, "stages.pretrain.ticks=2")
    left = artifacts("pretrain")
    run(pipeline)
    before = folders()
    (folder,) = artifacts("pretrain") - left if needed else left
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    with pytest.raises(UserError, match="format 9, and this version reads"):
        gc(pipeline, "stages.pretrain.ticks=3", delete=True)
    assert folders() == before
    (line,) = [line for line in status(pipeline).splitlines() if line.startswith("!")]
    assert "format 9" in line
    assert folder.name in line


def artifacts(kind: str) -> set[Path]:
    return set(Path("runs/artifacts").glob(f"{kind}-*"))


def test_status_tells_of_orphans(pipeline: Path) -> None:
    run(pipeline)
    assert "gc" not in status(pipeline)
    run(pipeline, "stages.pretrain.ticks=4", "stages.pretrain.mode=fail")
    run(pipeline)
    assert "1 folder of unfinished work that no ledger needs (" in status(pipeline)
    assert "`orchestrator gc toy.yaml` lists and deletes them" in status(pipeline)
    (left,) = folders() - {f"artifacts/{path.name}" for path in Path("runs/artifacts").iterdir()}
    assert f"  {left}\n" in status(pipeline)
    assert left.startswith("work/pretrain-")


@pytest.fixture(scope="module")
def ran_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `runs/` of a pipeline that ran with two settings of `pretrain`, and then with the first one again."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").write_bytes(b"a")
    (folder / "toy.yaml").write_text(PIPELINE)
    with contextlib.chdir(folder):
        for overrides in ((), ("stages.pretrain.ticks=2",), ()):
            run(Path("toy.yaml"), *overrides)
    return folder / "runs"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parts", 7),
        ("parts", {"inputs": [1]}),
        ("parts", {"inputs": {"index": 7}}),
        ("pieces", {"a": 1}),
        ("pieces", [["pretrain", 7]]),
        ("pieces", 3),
        ("inputs", "x"),
        ("code", 7),
        ("code", {"files": [1]}),
        ("versions", ["torch"]),
        ("made_by", 1),
        ("stage", {}),
        ("run_id", 1),
    ],
)
def test_a_provenance_that_cannot_be_is_damage_and_named_once(
    pipeline: Path, ran_twice: Path, caplog: pytest.LogCaptureFixture, name: str, value: object
) -> None:
    shutil.copytree(ran_twice, "runs")
    for folder in artifacts("pretrain"):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["provenance"][name] = value
        path.write_text(json.dumps(manifest))
    assert "artifacts that no ledger needs" in status(pipeline)
    assert "2 artifacts that no ledger needs" in gc(pipeline).lower()
    assert planned(pipeline)["pretrain"].action == "run"
    said = [text for text in map(str, (one.getMessage() for one in caplog.records)) if "is damaged" in text]
    assert len(said) == len(set(said)) == 2
    assert all(f"no valid {name}" in text for text in said)


def _changed_events(kind: str, *, with_key: bool) -> None:
    """Another setting in each event of a stage, as a damaged disk or a hand may leave it."""
    for path in Path("runs/ledger/toy").glob("*.json"):
        event = json.loads(path.read_text())
        if event.get("parts", {}).get("kind") == kind:
            event["parts"]["config"]["ticks"] = {}
            if not with_key:
                del event["key"]
            path.write_text(json.dumps(event))


def test_an_event_whose_key_does_not_fit_its_parts_is_named(
    pipeline: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(pipeline)
    _changed_events("pretrain", with_key=True)
    text = "records cannot be read, so it is unknown which artifacts are needed"
    assert text in status(pipeline)
    with pytest.raises(UserError, match=text):
        gc(pipeline)
    said = [
        record.getMessage() for record in caplog.records if "does not fit its parts" in record.getMessage()
    ]
    assert len(said) == len(set(said)) == 2
    assert all("ledger/toy/0" in line for line in said)


def test_status_and_gc_agree_on_a_changed_event_of_an_earlier_version(pipeline: Path) -> None:
    run(pipeline)
    _changed_events("evaluate", with_key=False)
    assert "Everything in the store is needed." in gc(pipeline)
    assert "Left behind" not in status(pipeline)


def test_status_and_gc_agree_when_settings_are_as_they_were(pipeline: Path) -> None:
    run(pipeline)
    run(pipeline, "stages.pretrain.ticks=2")
    run(pipeline, "stages.pretrain.ticks=3")
    # The file is as it was in the first run.
    listed = {line.split()[0] for line in gc(pipeline).splitlines() if line.strip().startswith("artifacts/")}
    assert kinds(listed) == ["artifacts/evaluate", "artifacts/pretrain"]
    shown = {line.strip() for line in status(pipeline).splitlines() if line.startswith("  artifacts/")}
    assert shown == listed


def test_unfinished_work_and_the_last_good_artifact_are_needed(pipeline: Path) -> None:
    run(pipeline)
    run(pipeline, "stages.pretrain.ticks=4", "stages.pretrain.mode=fail")
    before = folders()
    assert kinds(before)[-1] == "work/pretrain"
    gc(pipeline, delete=True)
    assert folders() == before


def test_what_another_pipeline_of_the_store_needs_stays(pipeline: Path) -> None:
    run(pipeline)
    mine = folders()
    run(pipeline, "name=other", "stages.pretrain.ticks=2")
    run(pipeline, "name=other", "stages.pretrain.ticks=3", "stages.pretrain.mode=fail")
    before = folders()
    assert before > mine
    gc(pipeline, delete=True)
    assert folders() == before


def test_nothing_is_deleted_while_a_pipeline_of_the_store_runs(pipeline: Path) -> None:
    run(pipeline, "stages.pretrain.ticks=2")
    run(pipeline)
    before = folders()
    for name in ("toy", "a-new-one"):
        with Workspace("runs/").drive(name), pytest.raises(UserError) as caught:
            gc(pipeline, delete=True)
        assert name in str(caught.value)
        assert folders() == before


def test_no_pipeline_starts_while_orphans_are_deleted(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that the store has not heard of."""
    run(pipeline, "stages.pretrain.ticks=2")
    run(pipeline)
    refused = []
    delete = LocalStore.delete

    def start_and_delete(self: LocalStore, name: str) -> None:
        if name.startswith("artifacts/"):
            for pipeline_name in ("toy", "a-new-one"):
                with pytest.raises(UserError) as caught, Workspace("runs/").drive(pipeline_name):
                    pass
                refused.append(caught.value.what)
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", start_and_delete)
        assert "Deleted" in gc(pipeline, delete=True)
    assert refused[0].startswith("pipeline 'toy' is already being run by process")
    assert refused[1].startswith("`orchestrator gc` is already being run by process")
    with Workspace("runs/").drive("a-new-one"):
        pass


def test_pieces_are_needed_as_long_as_their_stage(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the stage is done, or was cut off; a piece that only has work counts, too."""
    names = ["a", "b"]
    broken = {"b"}

    def run_pieces(self: toys.Pretrain, context: Context) -> dict[str, float]:
        for name in names:
            with context.part("piece", {"name": name}) as part:
                if part.artifact is None:
                    (part.work / "under-way").touch()
                    if name in broken:
                        raise RuntimeError(f"{name} broke")
                    draft = context.out.with_name(f"draft-{name}")
                    draft.mkdir()
                    (draft / "name").write_text(name)
                    part.publish(draft, {})
        (context.out / "result.json").write_text("{}")
        return {}

    monkeypatch.setattr(toys.Pretrain, "run", run_pieces)
    run(pipeline)
    before = folders()
    assert kinds(before) == ["artifacts/curate", "artifacts/piece", "work/piece", "work/pretrain"]
    gc(pipeline, delete=True)
    assert folders() == before
    broken.clear()
    run(pipeline)
    gc(pipeline, delete=True)
    assert kinds(folders()).count("artifacts/piece") == 2
    names[:] = ["a", "c"]
    run(pipeline, "stages.pretrain.ticks=2")
    assert kinds(folders()).count("artifacts/piece") == 3
    gc(pipeline, "stages.pretrain.ticks=2", delete=True)
    pieces = {path.read_text() for path in Path("runs/artifacts").glob("piece-*/name")}
    assert pieces == {"a", "c"}


def test_a_store_of_the_earlier_way_of_making_keys_is_made_anew_once(pipeline: Path) -> None:
    run(pipeline)
    run(pipeline, "stages.pretrain.ticks=4", "stages.pretrain.mode=fail")
    old = make_old(Path("runs"))
    plans = planned(pipeline)
    assert {item.action for item in plans.values()} == {"run"}
    assert plans["curate"].reasons == ("an upgrade changed the format of keys: 1 → 2",)
    assert run(pipeline)[0] == 0
    found = {orphan.name for orphan in orphans(Workspace("runs/"))}
    assert found == old
    gc(pipeline, delete=True)
    assert not old & folders()
    assert {item.action for item in planned(pipeline).values()} == {"cached"}


def make_old(store: Path) -> set[str]:
    """Ledger, artifacts and work as format 1 had them: a hash of code in each key; the folders, renamed."""
    for path in store.glob("ledger/toy/*.json"):
        event = json.loads(path.read_text())
        if "parts" in event:
            del event["parts"]["format"]
            event["parts"]["code"] = "0123456789abcdef"
            path.write_text(json.dumps(event))
    renamed = set()
    for place in ("artifacts", "work"):
        for path in (store / place).iterdir():
            kind, _, key = path.name.rpartition("-")
            path.rename(path.with_name(f"{kind}-{key[::-1]}"))
            renamed.add(f"{place}/{kind}-{key[::-1]}")
    for path in store.glob("artifacts/*/manifest.json"):
        manifest = json.loads(path.read_text())
        kind, _, start = path.parent.name.rpartition("-")
        manifest["key"] = start + "0" * 48
        del manifest["provenance"]["code"], manifest["provenance"]["inputs"]
        path.write_text(json.dumps(manifest))
    return renamed


@pytest.mark.parametrize("kind", ["curate", "pretrain"])
def test_links_are_deleted_and_never_followed(pipeline: Path, tmp_path: Path, kind: str) -> None:
    """Be it to a folder elsewhere or to one of the store."""
    run(pipeline)
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("p.txt", "manifest.json", "begun_from.json"):
        (precious / name).write_text("mine")
    (needed,) = artifacts("curate")
    links = [Path("runs", place, f"{kind}-{digit * 16}") for place in ("artifacts", "work") for digit in "12"]
    Path("runs/work").mkdir(exist_ok=True)
    for link in links:
        link.symlink_to(precious if link.name.endswith("1") else needed.absolute())
    kept = sorted(path.name for path in needed.iterdir())
    assert "2 artifacts and 2 folders of unfinished work" in gc(pipeline)
    gc(pipeline, delete=True)
    assert not any(link.is_symlink() for link in links)
    assert len(list(precious.iterdir())) == 3
    assert sorted(path.name for path in needed.iterdir()) == kept


def test_a_run_replaces_a_link_by_its_artifact(pipeline: Path, tmp_path: Path) -> None:
    run(pipeline)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "p.txt").write_text("mine")
    (folder,) = artifacts("curate")
    shutil.rmtree(folder)
    folder.symlink_to(precious)
    assert run(pipeline)[0] == 0
    assert not folder.is_symlink()
    assert [path.name for path in precious.iterdir()] == ["p.txt"]
    assert {item.action for item in planned(pipeline).values()} == {"cached"}


def test_work_in_a_link_is_refused(pipeline: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "p.txt").write_text("mine")
    run(pipeline, "stages.pretrain.mode=fail")
    (folder,) = Path("runs/work").glob("pretrain-*")
    shutil.rmtree(folder)
    folder.symlink_to(precious)
    workspace, key = Workspace("runs/"), folder.name.rpartition("-")[2]
    for use in (workspace.reached, workspace.drop_work):
        with pytest.raises(UserError, match="links in a store are not followed"):
            use("pretrain", key)
    assert [path.name for path in precious.iterdir()] == ["p.txt"]


def test_a_link_in_place_of_a_ledger_stops_the_deletion(pipeline: Path, tmp_path: Path) -> None:
    """What is needed is not known then."""
    run(pipeline, "name=other", "stages.pretrain.ticks=2")
    run(pipeline)
    before = folders()
    Path("runs/ledger/other").rename(tmp_path / "elsewhere")
    Path("runs/ledger/other").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="links in a store are not followed"):
        gc(pipeline, delete=True)
    assert folders() == before


def test_folders_of_others_are_named_and_stay(pipeline: Path) -> None:
    for ticks in (1, 2, 1):
        run(pipeline, "store=.", f"stages.pretrain.ticks={ticks}")
    others = [
        Path("work/thesis/ch1.tex"),
        Path("artifacts/photo-shoot/a.raw"),
        Path("work/x-0123456789ABCDEF/y"),
    ]
    for path in others:
        path.parent.mkdir(parents=True)
        path.touch()
    for delete in (False, True):
        said = gc(pipeline, "store=.", "stages.pretrain.ticks=1", delete=delete)
        assert "Not made by orchestrator, and kept: artifacts/photo-shoot, work/thesis, work/x-0123" in said
        assert "2 artifacts that" in said
        assert all(path.exists() for path in others)


@pytest.mark.long
def test_in_a_bucket_the_same(pipeline: Path, s3_uri: str) -> None:
    store = f"store={s3_uri}"
    run(pipeline, store)
    workspace = Workspace(s3_uri)
    kept = set(workspace.store().list("artifacts/"))
    run(pipeline, store, "stages.pretrain.ticks=4", "stages.pretrain.mode=fail")
    run(pipeline, store, "stages.pretrain.ticks=2")
    run(pipeline, store)
    cached = {path.name for path in (workspace.root / "artifacts").iterdir()}
    assert len(cached) == 5
    assert "2 artifacts and 1 folder of unfinished work" in gc(pipeline, store, delete=True)
    assert set(workspace.store().list("artifacts/")) == kept
    assert list(workspace.store().list("work/")) == []
    assert {path.name for path in (workspace.root / "artifacts").iterdir()} == {
        name.split("/")[1] for name in kept
    }
    assert list((workspace.root / "work").iterdir()) == []
    assert {item.action for item in planned(pipeline, store).values()} == {"cached"}
