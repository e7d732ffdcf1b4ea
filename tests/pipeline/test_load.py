"""Bad pipeline files: one error, with line, key path, value and the nearest right name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import toys

from orchestrator.errors import UserError
from orchestrator.pipeline.load import LoadedPipeline, load, unwritable_folders
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.storage.open import open_store

ROOT = Path(__file__).parents[2]
HEAD = "name: toy\nstages:\n"
CURATE = "  a: {kind: curate}\n"


def resolved(path: Path, *overrides: str) -> LoadedPipeline:
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    resolve(loaded, lambda source, name: "same")
    return loaded


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolved(path, *overrides)
    assert not Path("runs").exists(), "a bad file must leave nothing behind"
    return str(caught.value)


BAD = {
    "unknown key": (
        HEAD + "  a:\n    kind: curate\n    tiks: 3\n",
        ["unknown key 'tiks' in stage 'a'", "toy.yaml:5", "  stages.a.tiks\n", "'ticks'"],
    ),
    "unknown nested key": (
        HEAD + "  a:\n    kind: curate\n    optim:\n      lrr: 3\n",
        ["unknown key 'lrr'", "toy.yaml:6", "  stages.a.optim.lrr\n", "'lr'"],
    ),
    "unknown top key": ("nam: toy\nname: toy\nstages:\n" + CURATE, ["'nam'", "toy.yaml:1", "'name'"]),
    "misspelt kind": (HEAD + "  a: {kind: currate}\n", ["'currate'", "toy.yaml:3", "a.kind", "'curate'"]),
    "no kind": (
        HEAD + "  evaluat: {ticks: 3}\n",
        ["is missing the key 'kind'", "toy.yaml:3", "kind: evaluate"],
    ),
    "empty stage": (
        HEAD + "  a:\n",
        ["stages.a: null is not a value here: it must be a mapping", "toy.yaml:3", "(empty)"],
    ),
    "stage is a list": (HEAD + "  a: [1]\n", ["stages.a: must be a mapping", "toy.yaml:3"]),
    "wrong type": (
        HEAD + "  a: {kind: curate, ticks: many}\n",
        ["stages.a.ticks: must be an integer, not many", "toy.yaml:3  stages.a.ticks = many"],
    ),
    "wrong choice": (HEAD + "  a: {kind: curate, mode: fial}\n", ["not fial", "toy.yaml:3", "'fail'"]),
    "zero workers": (
        "name: toy\nelastic: {workers: 0}\nstages:\n" + CURATE,
        ["elastic.workers: must be greater than or equal to 1, not 0", "toy.yaml:2"],
    ),
    "zero workers of a stage": (
        HEAD + CURATE + "  b: {kind: pretrain, needs: a, elastic: {workers: [0, 2]}}\n",
        ["must be greater than or equal to 1, not 0", "toy.yaml:4  stages.b.elastic.workers.0"],
    ),
    "fewest over most": (
        "name: toy\nelastic: {workers: [3, 1]}\nstages:\n" + CURATE,
        ["min_workers (3) is above max_workers (1)", "toy.yaml:2"],
    ),
    "unknown need": (
        HEAD + "  prepare: {kind: curate}\n  b: {kind: pretrain, needs: [prepar]}\n",
        ["stage 'b' needs 'prepar'", "toy.yaml:4", "'prepare'"],
    ),
    "no need": (
        HEAD + CURATE + "  b: {kind: pretrain}\n",
        ["is missing its input 'index'", "toy.yaml:4", "add a to"],
    ),
    "two for one": (
        HEAD + CURATE + "  c: {kind: curate}\n  b: {kind: pretrain, needs: [a, c]}\n",
        ["needs 2: a, c", "toy.yaml:5", "keep one"],
    ),
    "useless need": (
        HEAD + CURATE + "  c: {kind: curate, needs: a}\n",
        ["stage 'c' needs 'a' of kind curate", "toy.yaml:4", "no inputs"],
    ),
    "cycle": (
        HEAD + CURATE + "  b: {kind: pretrain, needs: [a, c]}\n  c: {kind: evaluate, needs: b}\n",
        ["b → c → b", "toy.yaml:5"],
    ),
    "missing folder": (
        "name: toy\ndata:\n  p: {path: fotos}\nstages:\n" + CURATE,
        ["no such folder: fotos", "toy.yaml:3  data.p.path = fotos", "did you mean photos?"],
    ),
    "missing captions": (
        "name: toy\ndata:\n  p:\n    path: photos\n    captions: c.csv\nstages:\n" + CURATE,
        ["no such file: c.csv", "toy.yaml:5  data.p.captions"],
    ),
    "unknown dataset": (
        "name: toy\ndata: {photos: {path: photos}}\nstages:\n  a: {kind: curate, data: photo}\n",
        ["the dataset 'photo'", "toy.yaml:4  stages.a.data = photo", "'photos'"],
    ),
    "no stages": ("name: toy\nstages: {}\n", ["no stages", "toy.yaml:2"]),
    "unusable stage name": (HEAD + "  a/b: {kind: curate}\n", ["'a/b' is not a usable name", "toy.yaml:3"]),
    "bad name": ("name: Toy!\nstages:\n" + CURATE, ["name: must match", "not Toy!", "toy.yaml:1"]),
    "twice": (HEAD + CURATE + CURATE, ["'a' is written twice", "toy.yaml:4", "line 3"]),
    "not YAML": (HEAD + "  a: {kind: curate\n", ["not valid YAML", "toy.yaml:4"]),
    "tab": (HEAD + "\ta: 3\n", ["not valid YAML", "toy.yaml:3:1", "not tabs"]),
    "empty": ("# nothing\n", ["is empty"]),
    "a list": ("- a\n", ["must be a mapping", "toy.yaml:1"]),
    "S3": ("name: toy\nstore: s3://b/p\nstages:\n" + CURATE, ["s3://b/p", "toy.yaml:2"]),
    "store is a file": (
        "name: toy\nstore: toy.yaml\nstages:\n" + CURATE,
        ["toy.yaml is a file", "toy.yaml:2"],
    ),
    "tracking": (
        "name: toy\ntracking: {uri: foo}\nstages:\n" + CURATE,
        ["'foo'", "toy.yaml:2  tracking.uri"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_readable_error(name: str, write: Callable[[str], Path]) -> None:
    text, expected = BAD[name]
    said = message(write(text))
    assert not [part for part in expected if part not in said], said
    assert "pydantic" not in said
    assert "Input should" not in said


def test_the_keys_of_a_task_are_those_of_its_type(write: Callable[[str], Path]) -> None:
    text = (
        "  t: {kind: finetune, needs: p, steps: 2, task: {type: segmentation, data: {path: x}, classes: 3}}\n"
    )
    path = write("name: toy\nstages:\n" + text)
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert "unknown key 'classes' in stage 't', task" in said
    assert "did you mean 'classes'" not in said
    assert "num_doublings" in said


def test_a_misspelt_required_key_is_one_message_not_two(write: Callable[[str], Path]) -> None:
    said = message(write("nam: toy\nstages:\n" + CURATE))
    assert "unknown key 'nam'" in said
    assert "lacks" not in said


def test_every_mistake_is_named_at_once(write: Callable[[str], Path]) -> None:
    said = message(write("name: toy\nsed: 1\nstages:\n  a: {kind: curate, ticks: x}\n  b: {kind: q}\n"))
    assert [line.strip().split()[1].rstrip(",") for line in said.splitlines() if line.startswith("  at")] == [
        "toy.yaml:2",
        "toy.yaml:4",
        "toy.yaml:5",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.pretrian.ticks=2", ["no stage 'pretrian'", "`stages.pretrian.ticks=2`", "'pretrain'"]),
        ("stages.pretrain.tiks=2", ["unknown key 'tiks'", "`stages.pretrain.tiks=…`", "'ticks'"]),
        ("elastik.workers=2", ["unknown key 'elastik'", "'elastic'"]),
        ("stages.pretrain.ticks=few", ["must be an integer, not few", "command line"]),
        ("stages.pretrain.ticks.x=2", ["must be an integer", "command line"]),
        ("stages.pretrain.needs.x=2", ["has no keys", "command line"]),
        ("data.photo.path=x", ["no dataset 'photo'", "'photos'"]),
        ("seed", ["not an override", "key.path=value"]),
        ("seed=[", ["not valid YAML", "`seed=…`"]),
    ],
)
def test_a_bad_override_is_one_readable_error(pipeline: Path, override: str, expected: list[str]) -> None:
    said = message(pipeline, override)
    assert not [part for part in expected if part not in said], said


def test_exact_sums_on_zero_1_and_2_are_refused(pipeline: Path) -> None:
    file = Path(__file__).parents[2] / "conf" / "full_pipeline.yaml"
    places = ("stages.pretrain.zero_stage", "stages.distill.students.vit-nano.zero_stage")
    with pytest.raises(UserError) as caught:
        load(file, [f"{place}=2" for place in places], needs_data=False)
    said = str(caught.value)
    assert said.count("elastic.exact does not work with ZeRO 1 and 2") == 2
    assert all(place in said for place in places)
    load(file, [*(f"{place}=2" for place in places), "elastic.exact=false"], needs_data=False)
    for works in ("auto", "0", "3"):
        load(file, [f"{place}={works}" for place in places], needs_data=False)


def test_a_misspelt_file_name_is_corrected(pipeline: Path) -> None:
    assert "did you mean toy.yaml?" in message(Path("toy.yml"))


def test_overrides_are_yaml_and_reach_new_sections(write: Callable[[str], Path]) -> None:
    path = write(HEAD + CURATE)
    spec = resolved(path, "elastic.workers=[2, 4]", "stages.a.optim.lr=1e-3", "seed=7").spec
    assert spec.elastic.workers == (2, 4)
    assert spec.stages["a"].optim.lr == 0.001  # type: ignore[attr-defined]
    assert spec.seed == 7


def test_on_and_off_are_words_and_yes_and_no_still_answer(write: Callable[[str], Path]) -> None:
    """YAML 1.1 makes booleans of all four, so `preemption_notices: off` and `trigger: {on: …}` could not be said."""
    path = write(HEAD + CURATE + "cluster: {preemption_notices: off, dashboard: yes}\n")
    cluster = resolved(path).spec.cluster
    assert (cluster.preemption_notices, cluster.dashboard) == ("off", True)
    changed = resolved(path, "cluster.dashboard=no", "cluster.preemption_notices=aws").spec.cluster
    assert (changed.preemption_notices, changed.dashboard) == ("aws", False)
    assert resolved(path, "cluster.preemption_notices=off").spec.cluster.preemption_notices == "off"


def test_the_resolved_file_loads_to_the_same_pipeline(pipeline: Path, write: Callable[[str], Path]) -> None:
    loaded = resolved(pipeline, "stages.pretrain.ticks=9")
    again = resolved(write(loaded.resolved()))
    assert again.spec == loaded.spec


def test_merge_keys_and_anchors_work_and_keep_their_lines(write: Callable[[str], Path]) -> None:
    text = HEAD + "  a: &base {kind: curate, ticks: 4}\n  b:\n    <<: *base\n    optim: {lr: x}\n"
    assert "toy.yaml:6  stages.b.optim.lr = x" in message(write(text))


def test_old_keys_work_and_are_named_in_one_notice(
    write: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    stage = "  b: {kind: pretrain, needs: a, elastic: {hang_s: 60}}\n"
    path = write("name: toy\nelastic: {silence_s: 20}\nstages:\n" + CURATE + stage)
    loaded = resolved(path, "elastic.hang_s=90")
    own = loaded.spec.stages["b"].elastic
    assert (loaded.spec.elastic.heartbeat_timeout_s, loaded.spec.elastic.stall_timeout_s) == (20, 90)
    assert own is not None
    assert own.stall_timeout_s == 60
    (notice,) = caplog.messages
    assert "toy.yaml:2  elastic.silence_s is now heartbeat_timeout_s" in notice
    assert "toy.yaml:5  stages.b.elastic.hang_s is now stall_timeout_s" in notice
    assert "hang_s=…`  elastic.hang_s is now stall_timeout_s" in notice
    said = message(path, "elastic.silence_s=0.5")
    assert "elastic.heartbeat_timeout_s: must be greater than 1, not 0.5" in said
    said = message(path, "elastic.heartbeat_timeout_s=5")
    assert "silence_s is the old name of heartbeat_timeout_s: leave it out" in said


def test_an_old_key_of_a_stage_works_too(caplog: pytest.LogCaptureFixture) -> None:
    file = ROOT / "conf/full_pipeline.yaml"
    loaded = load(file, ["stages.distill.replay=true", "elastic.hang_s=90"], needs_data=False)
    assert loaded.spec.stages["distill"].teacher_cache  # type: ignore[attr-defined]
    (notice,) = caplog.messages
    assert "elastic.hang_s is now stall_timeout_s" in notice
    assert "stages.distill.replay is now teacher_cache" in notice
    with pytest.raises(UserError, match="replay is the old name of teacher_cache: leave it out"):
        load(file, ["stages.distill.replay=true", "stages.distill.teacher_cache=true"], needs_data=False)


def test_workers_may_be_the_word_auto(write: Callable[[str], Path]) -> None:
    text = "name: toy\nelastic: {workers: auto}\nstages:\n" + CURATE
    spec = resolved(write(text)).spec.elastic
    assert spec.every_device
    assert spec.workers[0] == 1
    assert "workers: auto" in resolved(write(text)).resolved()
    assert resolved(write(text), "elastic.workers=[4, auto]").spec.elastic.workers[0] == 4
    said = message(write(text), "elastic.workers=atuo")
    assert "elastic.workers: must be a number, two numbers such as [1, 4], or auto, not 'atuo'" in said


def test_what_a_worker_needs_is_checked_and_its_secrets_stay_out_of_records(
    write: Callable[[str], Path],
) -> None:
    env = "{env_vars: {TOKEN: hunter2}}"
    text = f"name: toy\nelastic: {{resources: {{runtime_env: {env}, labels: {{a: b}}}}}}\nstages:\n" + CURATE
    loaded = resolved(write(text), "elastic.resources.memory=8GiB")
    assert loaded.spec.elastic.resources.memory == 8 * 2**30
    assert loaded.spec.elastic.resources.runtime_env["env_vars"]["TOKEN"] == "hunter2"
    assert "hunter2" not in loaded.resolved()
    assert "TOKEN" in loaded.resolved()
    said = message(write(text), "elastic.resources.gpu=1.5")
    assert "elastic.resources.gpu: must be a whole number, or a share below 1, not 1.5" in said
    said = message(write(text.replace("env_vars", "env_var")))
    assert "unknown key 'env_var' of a runtime environment" in said
    assert "hunter2" not in said
    for bad in (
        "elastic.resources.runtime_env=hunter2",
        "elastic.resources.runtime_env.env_vars=hunter2",
        "elastic.resources.runtime_env.env_vars.TOKEN=[hunter2]",
        "elastic.resources.runtime_env.hunter=hunter2",
        "elastic.resources={runtime_env: {env_vars: {TOKEN: [hunter2]}}}",
        "elastic.resources={runtime_env: {env_vars: {TOKEN: hunter2}}, gpu: 1.5}",
        "elastic.workers={runtime_env: {env_vars: {TOKEN: hunter2}}}",
    ):
        said = message(write(text), bad)
        assert "elastic." in said
        assert "hunter2" not in said
    said = message(write(text), "elastic.resources.gpus=1")
    assert "did you mean 'gpu'?" in said


@pytest.mark.parametrize(
    "store",
    ["", " ", "file://", "a" * 300, "~no-such-user-here/x"],
    ids=["none", "space", "file", "long", "user"],
)
def test_an_address_that_is_no_store_is_an_error_with_its_line(pipeline: Path, store: str) -> None:
    text = pipeline.read_text().replace("store: runs/", f"store: {json.dumps(store)}")
    pipeline.write_text(text)
    with pytest.raises(UserError, match=r"the address of the store is empty|cannot be used: ") as caught:
        load(pipeline, stage_type=toys.ToyStage)
    assert f"{pipeline}:2" in str(caught.value)
    with pytest.raises(UserError):
        open_store(store)


@pytest.mark.parametrize("name", ["artifacts", "work", "spool/toy"])
def test_a_folder_of_the_store_that_cannot_be_written_is_an_error_before_the_first_step(
    pipeline: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs", name).mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(name) and access(path, mode))
    loaded = load(pipeline, stage_type=toys.ToyStage)  # commands that only read go on
    (error,) = unwritable_folders(loaded)
    assert f"{name} cannot be written, so the store cannot be used" in str(error)
    assert f"{pipeline}:2" in str(error)


@pytest.mark.parametrize("name", ["ledger", "ledger/toy", "artifacts", "work", "holds", "spool/toy"])
@pytest.mark.parametrize("loop", [True, False])
def test_what_is_no_folder_in_a_store_is_an_error_with_its_line(
    pipeline: Path, name: str, loop: bool
) -> None:
    path = Path("runs", name)
    path.parent.mkdir(parents=True)
    if loop:
        path.symlink_to(path.name)
    else:
        path.touch()
    with pytest.raises(UserError, match="is not a folder, so the store cannot be used") as caught:
        load(pipeline, stage_type=toys.ToyStage)
    assert f"{pipeline}:2" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("what", ["not a regular file", "a folder and no file"])
@pytest.mark.parametrize("inside", [True, False])
def test_captions_that_are_no_regular_file_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, inside: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    odd = (photos if inside else tmp_path) / "odd.csv"
    if what == "not a regular file":
        os.mkfifo(odd)
    else:
        odd.mkdir()
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: p\ndata: {photos: {path: photos, captions: odd.csv}}\nstages: {a: {kind: curate, data: [photos]}}\n"
    )
    with pytest.raises(UserError) as caught:
        load(path)
    assert f"{what}: odd.csv" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_link_to_a_device_and_a_file_in_place_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").write_text("")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: p\ndata: {photos: {path: photos, captions: zero.csv}}\nstages: {a: {kind: curate, data: [photos]}}\n"
    )
    with pytest.raises(UserError) as caught:
        load(path)
    assert "not a folder: photos" in str(caught.value)
    assert "not a regular file: zero.csv" in str(caught.value)
    assert "did you mean" not in str(caught.value)
