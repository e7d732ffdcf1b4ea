"""A watcher's choice of the best checkpoint, what it reads of each kind of stage, and what it keeps and registers."""

from __future__ import annotations

import errno
import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch import Tensor, nn

import orchestrator
from orchestrator.data.index import ImageIndex
from orchestrator.data.splits import Splits
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Figure
from orchestrator.models import load_pretrained, save_pretrained
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.models.wrapped_backbone import build_wrapped, load_wrapped
from orchestrator.pipeline.watch import register as register_module
from orchestrator.pipeline.watch import watcher
from orchestrator.pipeline.watch.choice import Best, CheckpointScore, best_of, goodness, parsed
from orchestrator.pipeline.watch.register import Registering
from orchestrator.pipeline.watch.training import ModelTraining, Training
from orchestrator.pipeline.watch.watcher import WatchOptions, watch
from orchestrator.stages.common.checkpointed import CheckpointedModel, write_export
from orchestrator.stages.finetune.config import Finetune
from orchestrator.tracking import registry
from orchestrator.tracking.aliases import AliasedVersion
from orchestrator.tracking.answers import UnreachableError
from orchestrator.training.checkpoint.format import CheckpointError
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.checkpoint.whole import whole_tensors

from .watching import PIPELINE, Store, average, drawn, write_checkpoint


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Store(tmp_path)


# --- choosing ----------------------------------------------------------------------------------------------------


def scores(name: str, *values: float) -> list[CheckpointScore]:
    return [
        CheckpointScore(10 * at, {name: Figure(value), "other/rmse": Figure(9.0 - at)})
        for at, value in enumerate(values)
    ]


def test_the_best_is_the_first_of_the_highest() -> None:
    found = scores("knn/accuracy", 0.2, 0.5, math.nan, 0.5, 0.4)
    best = best_of(found)
    assert (best.step, best.name, str(best)) == (10, "knn/accuracy", "step 10, knn/accuracy 0.500")
    assert best_of(found[::-1]).step == 10, "the first by step, whatever was scored first"
    assert best_of(found, "knn").step == 10
    assert best_of(found, "other/rmse").step == 40, "less of an error is better"
    assert best_of(found, "other").step == 40
    with pytest.raises(UserError, match="there is no figure 'knn/acuracy'") as caught:
        best_of(found, "knn/acuracy")
    assert caught.value.hint == "did you mean 'knn/accuracy'?"


@pytest.mark.parametrize("name", ["rmse", "abs_rel", "relative_error", "cross_entropy", "set_loss"])
def test_less_of_an_error_is_better(name: str) -> None:
    assert goodness(f"validation/{name}", 0.1) > goodness(f"validation/{name}", 0.2)
    assert goodness(f"{name}/accuracy", 0.1) < goodness(f"{name}/accuracy", 0.2), "it is a metric's name"
    assert goodness(name, math.nan) == goodness(name, math.inf) == -math.inf


def test_each_task_is_chosen_in_the_direction_that_it_chooses_in() -> None:
    seen = set()
    for task in get_args(Finetune.model_fields["task"].annotation):
        name, better = task.model_construct().chosen_by
        assert (goodness(f"validation/{name}", 1.0) > goodness(f"validation/{name}", 2.0)) == (
            better == "less"
        )
        seen.add(better)
    assert seen == {"more", "less"}


def test_metrics_are_named_as_in_a_pipeline_file() -> None:
    assert [one.title for one in parsed(["knn", "image_retrieval"])] == ["knn", "image_retrieval"]
    assert [one.title for one in parsed([])] == ["knn"]
    with pytest.raises(UserError, match="linear_probe needs a split"):
        parsed(["linear_probe"])
    with pytest.raises(UserError, match="'linear_depth' cannot be used here"):
        parsed(["linear_depth"])
    with pytest.raises(UserError, match="'kn' cannot be used here"):
        parsed(["kn"])


# --- which checkpoints --------------------------------------------------------------------------------------------


def training(tmp_path: Path, finished: Path | None, kept: int | None = None) -> ModelTraining:
    model = CheckpointedModel(
        40,
        "model",
        lambda read, folder: folder.mkdir(),
        kept_step=None if kept is None else lambda path: kept,
    )
    done: Any = None if finished is None else SimpleNamespace(path=finished)
    return ModelTraining("x", "", "k", model, CheckpointStorage(tmp_path / "checkpoints"), lambda: done)


def test_each_checkpoint_and_the_finished_model_come_once_and_in_order(tmp_path: Path) -> None:
    assert training(tmp_path, None).steps(set()) == []
    for step in (0, 30, 5, 40):
        write_checkpoint(tmp_path / f"checkpoints/step-{step:08d}", step, {"ema/a": torch.ones(3)})
    trains, done = training(tmp_path, None), training(tmp_path, tmp_path)
    assert trains.steps(set()) == [0, 5, 30, 40]
    assert trains.steps({0, 30}) == [5, 40]
    assert trains.steps({0, 5, 30, 40}) == []
    assert done.steps(set()) == [0, 5, 30, 40]
    assert done.steps({40}) == [0, 5, 30]
    chose = training(tmp_path, tmp_path, kept=20)
    assert chose.steps(set()) == [0, 5, 20, 30], "the stage left the model of step 20, not the last one"
    assert done.folder_of(40, tmp_path / "scratch") == tmp_path / "model"
    assert chose.folder_of(20, tmp_path / "scratch") == tmp_path / "model"
    (tmp_path / "scratch").mkdir()
    assert trains.folder_of(40, tmp_path / "scratch") == tmp_path / "scratch/model"
    assert trains.folder_of(7, tmp_path / "scratch") is None, "training has removed it"


def test_weights_are_those_of_the_average_where_there_is_one(tmp_path: Path) -> None:
    tensors = {
        "ema/backbone.a": torch.ones(6),
        "master/backbone.a": torch.zeros(6),
        "master/head.b": torch.ones(2),
    }
    tensors["master/backbone.c"] = torch.full((1,), 3.0)
    write_checkpoint(tmp_path / "checkpoints/step-00000005", 5, tensors)
    found = {}

    def write(read: Any, folder: Path) -> None:
        shapes = {"backbone.": {"a": (2, 3), "c": (1,), "missing": (4,)}, "head.": {"b": (2,)}}
        write_export(read, shapes, folder / "export")
        found.update(load_file(folder / "export"))

    model = CheckpointedModel(40, "model", write)
    storage = CheckpointStorage(tmp_path / "checkpoints")
    ModelTraining("x", "", "k", model, storage, lambda: None).folder_of(5, tmp_path / "scratch")
    assert found.keys() == {"backbone.a", "backbone.c", "head.b"}, "what is not trained is not there"
    assert torch.equal(found["backbone.c"], torch.full((1,), 3.0)), "nor has each weight an average"
    assert torch.equal(found["backbone.a"], torch.ones(2, 3))
    assert torch.equal(found["head.b"], torch.ones(2)), "a job without an average has the weights"


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what", "hint"),
    [
        ("pretrian", "there is no stage 'pretrian'", "did you mean 'pretrain'?"),
        ("curate", "is of kind curate, whose checkpoints have no", "this file has pretrain, distill, tune"),
        ("text", "is of kind align_text, whose checkpoints have no", "this file has pretrain, distill, tune"),
        ("distill/smal", "stage 'distill' has no student 'smal'", "did you mean 'small'?"),
        ("distill/x", "stage 'distill' has no student 'x'", "there are: small, mini"),
        ("pretrain/x", "stage 'pretrain' has no student 'x'", "name the stage alone: pretrain"),
    ],
)
def test_a_stage_that_cannot_be_watched_is_one_mistake(
    store: Store, tmp_path: Path, name: str, what: str, hint: str
) -> None:
    text = {
        "kind": "align_text", "needs": ["curate", "pretrain"], "steps": 4, "batch_size": 4, "block_size": 4,
    }  # fmt: skip
    with pytest.raises(UserError, match=what) as caught:
        Training(store.load(text=text), name, tmp_path)
    assert caught.value.hint == hint


def test_what_is_needed_first_is_said(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'curate', which 'pretrain' needs, is not done yet"):
        watch(store.loaded, "pretrain", WatchOptions(once=True), print)
    store.curated()
    with pytest.raises(UserError, match="stage 'pretrain' has no checkpoint to score"):
        watch(store.loaded, "pretrain", WatchOptions(once=True), print)
    with pytest.raises(UserError, match="'pretrain', which 'distill' needs, is not done yet"):
        watch(store.loaded, "distill", WatchOptions(once=True), print)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"every_s": math.nan}, "the time between two checks cannot be"),
        ({"every_s": math.inf}, "the time between two checks cannot be"),
        ({"every_s": 0.0}, "the time between two checks cannot be"),
        ({"every_s": 86_401.0}, "the time between two checks cannot be"),
        ({"by": "kn"}, "there is no figure 'kn'"),
        ({"keep": "photos"}, "exists, and was not written by a watcher"),
        ({"keep": "pipeline.yaml/best"}, "cannot be made"),
        ({"register": Registering("a/b")}, "'a/b' is not the name of a registered model"),
        ({"register": Registering("")}, "'' is not the name of a registered model"),
        ({"register": Registering("m", "latest")}, "'latest' cannot be an alias"),
        ({"register": Registering("m", "V12")}, "'V12' cannot be an alias"),
        ({"register": Registering("m", "9a")}, "'9a' cannot be an alias"),
        ({"register": Registering("m", "champion")}, "the alias champion is that of `publish`"),
        ({"register": Registering("m", "challenger")}, "the alias challenger is that of `publish`"),
        ({"register": Registering("m", "production")}, "the alias production is that of stage 'publish'"),
    ],
)
def test_mistakes_in_options_are_told_before_anything_is_scored(
    store: Store, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], what: str
) -> None:
    store.curated()
    store.checkpoint("pretrain", 10, average(drawn("vit_femto", 1)))
    monkeypatch.setattr(ModelTraining, "folder_of", lambda *_: pytest.fail("a checkpoint was read"))
    given = {name: store.folder / value if name == "keep" else value for name, value in options.items()}
    with pytest.raises(UserError, match=what):
        watch(store.loaded, "pretrain", WatchOptions(once=True, **given), print)


def test_a_day_is_the_longest_time_between_two_looks() -> None:
    for seconds in (0.1, 86_400.0):
        watcher._check_options(WatchOptions(every_s=seconds))


def test_two_watchers_keep_their_best_in_one_folder(tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("a", "b")]
    for model in models:
        model.mkdir()
        (model / "config.json").write_text(model.name * 1000)
    score = CheckpointScore(1, {"knn/accuracy": Figure(0.5)})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: watcher._keep(models[number % 2], score, tmp_path / "best"), range(40)))
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["config.json", "watch.json"]
    assert (tmp_path / "best/config.json").read_text() in ("a" * 1000, "b" * 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "best"}, "no drafts are left"


def test_a_folder_that_cannot_be_written_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    move = Mock(side_effect=PermissionError(errno.EACCES, "denied"))
    monkeypatch.setattr(watcher, "move", move)
    with pytest.raises(PermissionError):
        watcher._keep(
            tmp_path / "model", CheckpointScore(1, {"knn/accuracy": Figure(0.5)}), tmp_path / "best"
        )
    assert move.call_count == 1


def test_a_watcher_that_is_stopped_while_it_replaces_a_model_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    for step in (1, 2):
        (tmp_path / "model/config.json").write_text(str(step))
        if step == 2:
            monkeypatch.setattr(watcher, "move", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) if step == 2 else nullcontext():
            score = CheckpointScore(step, {"knn/accuracy": Figure(0.5)})
            watcher._keep(tmp_path / "model", score, tmp_path / "best")
    assert (tmp_path / "best/config.json").read_text() == "1"


# --- each kind of stage -------------------------------------------------------------------------------------------


def test_a_backbone_is_scored_kept_and_registered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.curated()
    models = {step: drawn("vit_femto", step) for step in (10, 20, 30)}
    for step, model in models.items():
        store.checkpoint(
            "pretrain", step, average(model) | average(drawn("vit_femto", 0), "master/backbone.")
        )
    # Any photos would do for these: the figures are chosen, so that the best is in the middle.
    values = iter([0.5, 0.75, 0.75])
    monkeypatch.setattr(watcher.BackboneScorer, "__call__", lambda *_: {"knn/accuracy": Figure(next(values))})
    lines: list[str] = []
    options = WatchOptions(once=True, keep=store.folder / "best", register=Registering("food"))
    found = watch(store.loaded, "pretrain", options, lines.append)
    assert [score.step for score in found["pretrain"]] == [10, 20, 30]
    assert lines == [
        "pretrain, step 10: knn/accuracy 0.5; best so far: step 10, knn/accuracy 0.500",
        "pretrain: food@best-so-far is version 1",
        "pretrain, step 20: knn/accuracy 0.75; best so far: step 20, knn/accuracy 0.750",
        "pretrain: food@best-so-far is version 2",
        "pretrain, step 30: knn/accuracy 0.75; best so far: step 20, knn/accuracy 0.750",
        "pretrain: the best of 3 checkpoints is step 20, knn/accuracy 0.750",
        f"pretrain: its model is in {store.folder / 'best'}",
    ]
    assert json.loads((store.folder / "best/watch.json").read_text())["step"] == 20
    kept = load_pretrained(store.folder / "best").state_dict()
    for name, tensor in models[20].state_dict().items():
        assert torch.equal(kept[name], tensor), name
    uri = store.loaded.spec.tracking.uri
    client = MlflowClient(uri, uri)
    assert client.get_registered_model("food").aliases == {"best-so-far": 2}
    version = client.get_model_version("food", "2")
    assert version.tags["orchestrator.stage"] == "pretrain"
    assert version.tags["orchestrator.step"] == "20"
    assert version.tags["orchestrator.watch.value"] == "0.75"
    mlflow.set_tracking_uri(uri)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "watch pretrain"
    assert run.data.params["best_step"] == "20"
    assert run.data.metrics["watch/best_step"] == 20
    pulled = orchestrator.load("food@best-so-far", tracking=uri)
    assert pulled.features(store.folder / "photos/red/0.png").cls.shape == (1, 48)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError("broken"), "FAILED")]
)
def test_the_run_of_a_watcher_says_how_it_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: str
) -> None:
    store.curated()
    for step in (10, 20):
        store.checkpoint("pretrain", step, average(drawn("vit_femto", step)))
    scored = Mock(side_effect=[{"knn/accuracy": Figure(0.5)}, error])
    monkeypatch.setattr(watcher.BackboneScorer, "__call__", scored)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        watch(store.loaded, "pretrain", WatchOptions(once=True, keep=store.folder / "best"), print)
    mlflow.set_tracking_uri(store.loaded.spec.tracking.uri)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == status
    assert run.data.metrics["watch/best_step"] == 10, "what was found before is there"
    assert json.loads((store.folder / "best/watch.json").read_text())["step"] == 10


def test_students_are_scored_each_from_its_own_checkpoints(store: Store) -> None:
    store.curated()
    store.pretrained()
    small, mini = drawn("vit_femto", 1), drawn("convnext_mini", 2)
    store.checkpoint("distill", 5, average(small), store.student("small"))
    store.checkpoint("distill", 15, average(drawn("vit_femto", 3)), store.student("small"))
    store.checkpoint("distill", 10, average(mini), store.student("mini"))
    lines: list[str] = []
    options = WatchOptions(once=True, keep=store.folder / "best")
    found = watch(store.loaded, "distill", options, lines.append)
    steps = {name: [score.step for score in scored] for name, scored in found.items()}
    assert steps == {"distill/small": [5, 15], "distill/mini": [10]}
    assert "distill/mini: the best of 1 checkpoint is step 10" in lines[-2]
    kept = load_pretrained(store.folder / "best/mini").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in mini.state_dict().items())
    assert json.loads((store.folder / "best/small/watch.json").read_text())["step"] in (5, 15)
    # One student alone is kept where it was said.
    alone = WatchOptions(once=True, keep=store.folder / "one")
    assert watch(store.loaded, "distill/mini", alone, print).keys() == {"distill/mini"}
    assert load_pretrained(store.folder / "one").state_dict().keys() == mini.state_dict().keys()


def test_a_student_that_is_done_is_scored_as_it_was_published(store: Store) -> None:
    store.curated()
    store.pretrained()
    made = store.folder / "made"
    model = drawn("convnext_mini", 4)
    save_pretrained(made / "model", model.state_dict(), "convnext_mini", {"image_size": 32})
    store.publish("distill", made, store.student("mini"))
    found = watch(store.loaded, "distill/mini", WatchOptions(once=True), print)
    assert [score.step for score in found["distill/mini"]] == [20], "the student's own number of steps"


class Own(nn.Module):
    """A user's network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(x)
        return out


def test_a_network_from_elsewhere_is_a_student_too(tmp_path: Path, empty_database: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    students = {"net": {"module": f"{__name__}:Own"}}
    store = Store(tmp_path, distill={**PIPELINE["stages"]["distill"], "students": students})
    store.curated()
    store.pretrained()
    net = build_wrapped(NetworkSpec("module", f"{__name__}:Own"), 32, 7).net
    trained = {f"ema/backbone.net.{name}": param for name, param in net.named_parameters()}
    store.checkpoint("distill", 5, trained, store.student("net"))
    watch(store.loaded, "distill", WatchOptions(once=True, keep=tmp_path / "best"), print)
    kept = dict(load_wrapped(tmp_path / "best", [f"{__name__}:Own"]).net.named_parameters())
    assert all(torch.equal(kept[name], param) for name, param in net.named_parameters())


def test_a_fine_tuned_model_has_the_figures_of_its_validation_split(store: Store) -> None:
    store.curated()
    backbone = drawn("vit_femto", 1)
    store.pretrained(backbone)
    stage = store.loaded.spec.stages["tune"]
    assert isinstance(stage, Finetune)
    head = stage.task.goal(("green", "red")).head(48)
    dims = {name: tensor.shape for name, tensor in head.state_dict().items()}
    always = {0: "green", 1: "red"}
    for step, place in ((10, 0), (20, 1)):
        # A head that gives one class whatever it sees.
        state = {name: torch.zeros(shape) for name, shape in dims.items()}
        (bias,) = [name for name, shape in dims.items() if shape == (2,)]
        state[bias][place] = 5.0
        tensors = average(backbone, "master/backbone.") | {
            f"master/head.{name}": tensor for name, tensor in state.items()
        }
        store.checkpoint("tune", step, tensors)
    options = WatchOptions(once=True, keep=store.folder / "best", register=Registering("food"))
    found = watch(store.loaded, "tune", options, print)["tune"]
    index_of = {row.path: row.label for row in store.rows}
    split = _validation(store)
    for score, place in zip(found, (0, 1), strict=True):
        right = np.mean([index_of[path] == always[place] for path in split])
        assert score.figures["validation/accuracy"].value == pytest.approx(right)
        assert score.figures["validation/accuracy"].num == len(split)
    model = orchestrator.load(store.folder / "best")
    better = max(found, key=lambda score: score.figures["validation/accuracy"].value)
    assert json.loads((store.folder / "best/watch.json").read_text())["step"] == better.step
    assert model.predict(store.folder / "photos/red/0.png").labels == [always[better.step // 10 - 1]]


def _validation(store: Store) -> list[str]:
    stage: Any = store.loaded.spec.stages["tune"]
    index = ImageIndex(store.rows)
    splits = Splits.of(index, stage.split, where="x")
    return [store.rows[row].path for row in splits["validation"].tolist()]


def test_a_fine_tuning_takes_no_metrics_of_features(store: Store) -> None:
    store.curated()
    store.pretrained()
    with pytest.raises(UserError, match="'tune' are scored by the figures of its own task") as caught:
        watch(store.loaded, "tune", WatchOptions(once=True, metrics=("knn",)), print)
    assert caught.value.hint == "leave it out; --by names one of the figures, such as validation/accuracy"
    with pytest.raises(UserError, match="there is no figure 'knn'"):
        watch(store.loaded, "tune", WatchOptions(once=True, by="knn"), print)


# --- registering --------------------------------------------------------------------------------------------------


def register(
    store: Store, value: float, step: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[str]:
    """What a watcher says that finds one checkpoint of this value."""
    monkeypatch.setattr(watcher.BackboneScorer, "__call__", lambda *_: {"knn/accuracy": Figure(value)})
    monkeypatch.setattr(ModelTraining, "steps", lambda self, seen: sorted({step} - seen))
    lines: list[str] = []
    given = WatchOptions(once=True, register=Registering("food", **options))
    watch(store.loaded, "pretrain", given, lines.append)
    return [line for line in lines if "food" in line]


def test_the_alias_never_moves_to_what_is_not_better(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.curated()
    for step in (10, 20):
        store.checkpoint("pretrain", step, average(drawn("vit_femto", step)))
    assert register(store, 0.5, 10, monkeypatch) == ["pretrain: food@best-so-far is version 1"]
    # A watcher that begins again knows nothing of what the one before it saw.
    stays = "pretrain: food@best-so-far stays version 1, which is at least as good"
    assert register(store, 0.5, 20, monkeypatch) == [stays]
    assert register(store, 0.25, 20, monkeypatch) == [stays]
    assert register(store, math.nan, 20, monkeypatch) == []
    assert register(store, 0.75, 20, monkeypatch) == ["pretrain: food@best-so-far is version 2"]


def test_a_model_whose_figure_is_no_number_is_neither_kept_nor_registered(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.curated()
    for step in (10, 20):
        store.checkpoint("pretrain", step, average(drawn("vit_femto", step)))
    assert register(store, math.nan, 10, monkeypatch) == []
    kept = store.folder / "kept"
    lines: list[str] = []
    watch(store.loaded, "pretrain", WatchOptions(once=True, keep=kept), lines.append)
    assert lines[-1] == "pretrain: the best of 1 checkpoint is step 10, knn/accuracy nan"
    assert not kept.exists()
    assert register(store, 0.25, 20, monkeypatch) == ["pretrain: food@best-so-far is version 1"]


@pytest.mark.parametrize(
    ("tags", "is_better"),
    [
        ({}, True),
        ({"orchestrator.watch.value": "0.75"}, True),
        ({"orchestrator.watch.value": "0.4999"}, False),
        ({"orchestrator.watch.value": "nan"}, False),
        ({"orchestrator.watch.value": "much"}, False),
        ({"orchestrator.watch": "k2"}, False),
        ({"orchestrator.watch.by": "knn/other"}, False),
    ],
)
def test_only_the_same_figure_of_the_same_training_is_compared(tags: dict[str, str], is_better: bool) -> None:
    known = {
        "orchestrator.watch": "k1",
        "orchestrator.watch.by": "knn/accuracy",
        "orchestrator.watch.value": "0.5",
    }
    best = Best(10, "knn/accuracy", Figure(0.5))
    assert register_module._is_better(AliasedVersion(1, known | tags), best, "k1") is is_better


def test_an_alias_that_somebody_else_set_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.curated()
    store.checkpoint("pretrain", 10, average(drawn("vit_femto", 1)))
    register(store, 0.5, 10, monkeypatch, alias="mine")
    uri = store.loaded.spec.tracking.uri
    client = MlflowClient(uri, uri)
    client.create_model_version("food", str(store.folder))
    client.set_registered_model_alias("food", "staging", "2")
    client.set_registered_model_alias("food", "champion", "2")
    with pytest.raises(UserError, match="food@staging is version 2, which no watcher registered"):
        register(store, 0.75, 10, monkeypatch, alias="staging")
    assert client.get_registered_model("food").aliases == {"mine": 1, "staging": 2, "champion": 2}


def outage(monkeypatch: pytest.MonkeyPatch, answers: list[bool]) -> None:
    """A registry that answers each request, or not, as listed; then always."""
    holder = registry.holder

    def asked(*given: str) -> AliasedVersion | None:
        if answers and not answers.pop(0):
            raise UnreachableError("the registry cannot be reached: MLflow does not answer")
        return holder(*given)

    monkeypatch.setattr(registry, "holder", asked)


def watched(store: Store, values: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a watcher says that finds a checkpoint of each value, one at each look; nothing of it is there later."""
    looks, goes_on = list(values), [*(True for _ in values), False]
    monkeypatch.setattr(Training, "goes_on", lambda *_: goes_on.pop(0))
    monkeypatch.setattr(ModelTraining, "steps", lambda *_: [looks.pop(0)] if looks else [])
    figures = iter(values.values())
    monkeypatch.setattr(
        watcher.BackboneScorer, "__call__", lambda *_: {"knn/accuracy": Figure(next(figures))}
    )
    lines: list[str] = []
    watch(store.loaded, "pretrain", WatchOptions(every_s=0.001, register=Registering("food")), lines.append)
    return [line.removeprefix("pretrain: ") for line in lines if "regist" in line or "food" in line]


@pytest.mark.parametrize(
    ("answers", "values", "registered"),
    [
        # The first question is the one before anything is scored.
        ([True, False, False], {10: 0.5, 20: 0.25}, [0.5]),
        # The better one takes its place while the registry is away.
        ([True, False, False, False], {10: 0.5, 20: 0.75}, [0.75]),
        ([True, False], {10: 0.5, 20: 0.75}, [0.5, 0.75]),
    ],
)
def test_a_registry_that_is_away_for_a_while_gets_the_best_model_later(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[bool],
    values: dict[int, float],
    registered: list[float],
) -> None:
    store.curated()
    weights = {step: average(drawn("vit_femto", step)) for step in values}
    for step in values:
        store.checkpoint("pretrain", step, weights[step])
    outage(monkeypatch, list(answers))
    said = watched(store, values, monkeypatch)
    assert "step 10 is registered once it can be" in said[0]
    uri = store.loaded.spec.tracking.uri
    versions = MlflowClient(uri, uri).search_model_versions("name = 'food'")
    found = {int(one.version): float(one.tags["orchestrator.watch.value"]) for one in versions}
    assert [found[number] for number in sorted(found)] == registered
    assert said[-1] == f"food@best-so-far is version {len(registered)}"


def test_a_registry_that_stays_away_is_told_at_the_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.curated()
    store.checkpoint("pretrain", 10, average(drawn("vit_femto", 1)))
    outage(monkeypatch, [True, *[False] * 20])
    with pytest.raises(UserError, match="cannot be reached"):
        watched(store, {10: 0.5}, monkeypatch)


def test_a_model_that_cannot_be_concluded_holds_up_no_other() -> None:
    concluded = []

    def conclude(name: str) -> None:
        concluded.append(name)
        if name != "b":
            raise UserError(f"{name} has no checkpoint")

    watches: Any = [SimpleNamespace(conclude=partial(conclude, name)) for name in "abc"]
    with pytest.raises(UserError, match="a has no checkpoint"):
        watcher._conclude(watches)
    assert concluded == ["a", "b", "c"]


def test_an_alias_that_is_set_while_the_model_is_uploaded_is_left_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.curated()
    store.checkpoint("pretrain", 10, average(drawn("vit_femto", 1)))
    uri = store.loaded.spec.tracking.uri
    client, create = MlflowClient(uri, uri), registry._create

    def other(*given: Any) -> int:
        made = create(*given)
        client.create_model_version("food", str(store.folder))
        client.set_registered_model_alias("food", "staging", "2")
        return made

    monkeypatch.setattr(registry, "_create", other)
    with pytest.raises(UserError, match="food@staging is version 2, which no watcher registered"):
        register(store, 0.5, 10, monkeypatch, alias="staging")
    assert client.get_registered_model("food").aliases == {"staging": 2}
    assert [int(one.version) for one in client.search_model_versions("name = 'food'")] == [2], (
        "it is taken back"
    )


# --- parts of checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_workers_are_joined(tmp_path: Path, world: int) -> None:
    torch.manual_seed(0)
    whole = {
        "ema/backbone.a": torch.rand(10),
        "ema/backbone.b": torch.rand(2),
        "master/backbone.a": torch.rand(10),
    }
    folder = tmp_path / "step-00000007"
    record = write_checkpoint(folder, 7, whole, world)
    storage = CheckpointStorage(tmp_path)
    found = whole_tensors(storage, storage.find(7), "ema/backbone.")
    assert found.keys() == {"a", "b"}
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[f"ema/backbone.{name}"].numpy())
    record["keys"]["ema/backbone.b"] = 5
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"ema/backbone\.b has 2 of 5 elements"):
        whole_tensors(storage, storage.find(7), "ema/backbone.")
