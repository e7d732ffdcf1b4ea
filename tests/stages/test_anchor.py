"""When Gram anchoring starts, with what, and to whom: each rule by what it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from orchestrator.errors import UserError
from orchestrator.models import normalise
from orchestrator.objectives.gram import gram_loss
from orchestrator.stages.common import lineage
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.common.lineage import Health, Lineage, Snapshot
from orchestrator.stages.common.nets import HeadedBackbone
from orchestrator.stages.ssl.anchor import AnchorDecision, DenseHealthMonitor
from orchestrator.stages.ssl.gram import DenseHealth, Gram
from orchestrator.stages.ssl.gram_anchor import GramAnchor
from orchestrator.stages.ssl.high_res import HighRes
from orchestrator.stages.ssl.task import SelfSupervisedTask
from orchestrator.training.task import BlockTensors

HEADS = Heads(hidden=24, dino_bottleneck=8, dino_prototypes=32, ibot_bottleneck=8, ibot_prototypes=32)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
BASE: dict[str, Any] = {
    "kind": "gram_anchor", "needs": "x", "steps": 20, "batch_size": 4, "block_size": 4,
    "optimizer": {"lr": {"peak": 1e-3}}, "ema": {"peak": 0.9},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
}  # fmt: skip

# --- the watch --------------------------------------------------------------------------------------------------

TRIGGER = DenseHealth(on="dense_health", window=2, cosine_rise=0.09, locality_drop=0.19)
GOOD, WORSE, BAD = (0.2, 0.6), (0.25, 0.5), (0.3, 0.4)


def watched(
    trigger: DenseHealth, script: list[tuple[float, float]], mark: Health | None = None
) -> dict[int, str]:
    """What a watch says, by step, where it says anything."""
    watch = DenseHealthMonitor(trigger, {}, mark)
    said = {}
    for done, (cosine, locality) in enumerate(script, 1):
        verdict = watch.update(done, {"cls_patch_cosine": cosine, "patch_locality": locality, "loss": 1.0})
        if verdict is not AnchorDecision.GO_ON:
            said[done] = verdict.name
    return said


def both(*windows: tuple[float, float]) -> list[tuple[float, float]]:
    """Every window as a step above and one below its mean."""
    return [(c + sign * 0.05, v + sign * 0.05) for c, v in windows for sign in (1, -1)]


@pytest.mark.parametrize(
    ("change", "windows", "said"),
    [
        ({}, (GOOD, WORSE, BAD, BAD), {2: "KEEP", 6: "START"}),
        ({}, (WORSE, GOOD, WORSE, WORSE), {2: "KEEP", 4: "KEEP"}),
        # Worse than the best, not than the window before.
        ({"cosine_rise": 0.04, "locality_drop": 0.09}, (GOOD, WORSE), {2: "KEEP", 4: "START"}),
        # One figure alone is not enough unless the other is left out.
        ({}, (GOOD, (0.9, 0.5), (0.2, 0.1)), {2: "KEEP"}),
        ({"locality_drop": None}, (GOOD, (0.31, 0.6)), {2: "KEEP", 4: "START"}),
        ({"cosine_rise": None}, (GOOD, (0.2, 0.39)), {2: "KEEP", 4: "START"}),
        # A whole window counts: one bad step in it does not.
        ({"window": 4}, (GOOD, GOOD, GOOD, BAD), {4: "KEEP"}),
        ({"window": 4}, (GOOD, GOOD, BAD, BAD), {4: "KEEP", 8: "START"}),
        # Ever better: ever kept.
        ({}, (BAD, WORSE, GOOD), {2: "KEEP", 4: "KEEP", 6: "KEEP"}),
    ],
)
def test_what_a_watch_makes_of_figures(
    change: dict[str, Any], windows: tuple[tuple[float, float], ...], said: dict[int, str]
) -> None:
    assert watched(TRIGGER.model_copy(update=change), both(*windows)) == said


def test_an_earlier_snapshots_health_is_the_mark_to_beat() -> None:
    mark = Health(cosine=0.2, locality=0.6)
    assert watched(TRIGGER, both(BAD), mark) == {2: "START"}, "what earlier stages spoilt counts"
    assert watched(TRIGGER, both(WORSE), mark) == {}, "the snapshot stays the Gram teacher"
    assert watched(TRIGGER, both((0.19, 0.6)), mark) == {2: "KEEP"}


def test_all_it_knows_is_in_its_state() -> None:
    """Cut at every step, and gone on with by a watch of its own, as after a crash."""
    script = both(WORSE, GOOD, WORSE, BAD, GOOD)
    whole: dict[str, float] = {}
    watch = DenseHealthMonitor(TRIGGER, whole, None)
    verdicts = [watch.update(done, _metrics(step)) for done, step in enumerate(script, 1)]
    for cut in range(len(script)):
        state: dict[str, float] = {}
        said = []
        for done, step in enumerate(script, 1):
            if done == cut + 1:
                before = dict(state)
                state = {}
                restored = DenseHealthMonitor(TRIGGER, state, Health(cosine=0, locality=1))
                state.clear()
                state.update(before)
            else:
                restored = DenseHealthMonitor(TRIGGER, state, None)
            said.append(restored.update(done, _metrics(step)))
        assert said == verdicts
        assert state == whole
    assert verdicts[7] is AnchorDecision.START
    assert verdicts[8:] == [AnchorDecision.GO_ON] * 2, "it starts once"


def _metrics(step: tuple[float, float]) -> dict[str, float]:
    return {"cls_patch_cosine": step[0], "patch_locality": step[1]}


# --- the task ---------------------------------------------------------------------------------------------------


class Recorder:
    """Weights that only note what a task asks of them."""

    def __init__(self) -> None:
        self.copied: list[str] = []

    def update_ema(self, momentum: float) -> None:
        pass

    def copy_ema(self, name: str, prefix: str) -> None:
        self.copied.append(f"{name} {prefix}")


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    state = HeadedBackbone("vit_femto", 0.0, HEADS).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "anchor.safetensors")
    return tmp_path / "anchor.safetensors"


def make_task(anchor: Path, **settings: Any) -> SelfSupervisedTask:
    config = GramAnchor.model_validate({**BASE, **settings})
    torch.manual_seed(0)
    task = SelfSupervisedTask(config, RECIPE, 0, anchor)
    task.build("cpu")
    return task


def a_block(seed: int = 0, gram_size: int | None = None) -> BlockTensors:
    random = torch.Generator().manual_seed(seed)

    def pixels(views: int, size: int) -> torch.Tensor:
        return torch.randint(256, (views, 4, 3, size, size), dtype=torch.uint8, generator=random)

    masks = torch.zeros(2, 4, 16, dtype=torch.bool)
    masks[:, ::2, 3:7] = True
    tensors = {"globals": pixels(2, 32), "locals": pixels(2, 16), "masks": masks}
    if gram_size:
        tensors["gram"] = pixels(2, gram_size)
    return BlockTensors(0, 0, 1.0, tensors)


def gram_figure(task: SelfSupervisedTask, step: int, block: BlockTensors) -> float | None:
    """The Gram term at a step, None without."""
    task.prepare_step(step)
    metrics = task.losses(block, task.targets([block], lambda tensor: tensor)[0]).metrics
    return metrics["gram"].item() if "gram" in metrics else None


@pytest.mark.parametrize("antialias", [False, True])
def test_the_map_of_a_larger_gram_teacher_is_resized_as_the_config_says(
    anchor: Path, antialias: bool
) -> None:
    """Bicubic to the student's grid, smoothed first or not, against torch's own resizing of the features."""
    task, block = make_task(anchor, gram={"antialias": antialias}), a_block(gram_size=64)
    task.prepare_step(5)
    got = task.targets([block], lambda tensor: tensor)[0].gram_NPD
    assert got is not None
    with torch.no_grad():
        patches = task.modules.copies["gram"](normalise(block.tensors["gram"].flatten(0, 1))).patches
    maps = patches.mT.reshape(8, -1, 8, 8)
    wanted = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False, antialias=antialias)
    torch.testing.assert_close(got, wanted.flatten(2).mT)
    other = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False, antialias=not antialias)
    assert not torch.allclose(got, other.flatten(2).mT, rtol=1e-2)


def run(task: SelfSupervisedTask, metrics: Mapping[int, tuple[float, float]]) -> dict[int, list[str]]:
    """What is copied after each step that copies anything; steps not named are healthy."""
    copied = {}
    for step in range(task.config.steps):
        task.prepare_step(step)
        recorder = Recorder()
        task.after_step(step, recorder, _metrics(metrics.get(step, GOOD)))
        if recorder.copied:
            copied[step + 1] = recorder.copied
    return copied


def test_the_teacher_takes_the_ema_when_its_turn_comes_and_no_more_than_the_maximum(anchor: Path) -> None:
    updates = {"first_update": 5, "update_every": 4, "max_updates": 3}
    assert list(run(make_task(anchor, gram=updates), {})) == [5, 9, 13]
    assert list(run(make_task(anchor, gram={**updates, "max_updates": 1}), {})) == [5]
    assert run(make_task(anchor, gram={**updates, "max_updates": 0}), {}) == {}
    assert run(make_task(anchor, gram={}), {}) == {}, "without a first update there is none"
    assert run(make_task(anchor, gram=updates), {})[5] == ["gram backbone."]


def test_with_a_trigger_updates_and_weights_count_from_the_start(anchor: Path) -> None:
    task = make_task(
        anchor,
        local_weight={"start": 1.0, "peak": 0.5, "warmup_steps": 4},
        gram={
            "trigger": {"on": "dense_health", "window": 2, "cosine_rise": 0.05, "locality_drop": 0.1},
            "weight": {"peak": 2.0, "warmup_steps": 4}, "first_update": 5, "update_every": 4, "max_updates": 2,
        },
    )  # fmt: skip
    assert gram_figure(task, 0, a_block()) is None, "nothing is anchored before it starts"
    assert task.local_weight == 1.0
    # The first window is kept; the one of steps 6 and 7 has decayed: it starts after 8 updates.
    assert list(run(task, {6: BAD, 7: BAD})) == [2, 8 + 5, 8 + 9]
    weights = {}
    for step in (8, 9, 12, 19):
        task.prepare_step(step)
        weights[step] = (task.gram_weight, task.local_weight)
    assert weights == {8: (0.0, 1.0), 9: (0.5, 0.875), 12: (2.0, 0.5), 19: (2.0, 0.5)}
    assert gram_figure(task, 8, a_block()) == 0.0
    assert gram_figure(task, 12, a_block()) > 0


def test_the_gram_teacher_is_not_run_before_it_is_needed(anchor: Path) -> None:
    task = make_task(anchor, gram={"trigger": "dense_health"})
    task.modules.copies["gram"].register_forward_pre_hook(lambda *_: pytest.fail("it was"))
    assert gram_figure(task, 3, a_block()) is None


@pytest.mark.parametrize("clip", [False, True])
def test_the_term_is_the_loss_on_globals_against_a_teacher_at_twice_the_size(
    anchor: Path, clip: bool
) -> None:
    """By hand: the teacher's features of the large views, resized to the student's grid; locals play no part."""
    task = make_task(anchor, gram={"clip_negatives": clip, "weight": {"peak": 1.5}})
    block = a_block(gram_size=64)
    found = gram_figure(task, 0, block)
    with torch.no_grad():
        views = block.tensors["gram"].flatten(0, 1)
        features = task.modules.copies["gram"](normalise(views)).patches
        maps = features.transpose(1, 2).unflatten(2, (8, 8))
        small = F.interpolate(maps, (4, 4), mode="bicubic", align_corners=False, antialias=True)
        masks = block.tensors["masks"].flatten(0, 1)
        student = task.modules.trainable.backbone(normalise(block.tensors["globals"].flatten(0, 1)), masks)
        teacher = small.flatten(2).transpose(1, 2)
        expected = 1.5 * gram_loss(student.patches, teacher, clip_negatives=clip)
        other = 1.5 * gram_loss(student.patches, teacher, clip_negatives=not clip)
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert found != pytest.approx(other.item(), rel=1e-3), "no similarity was negative"
    changed = BlockTensors(0, 0, 1.0, {**block.tensors, "locals": a_block(seed=9).tensors["locals"]})
    assert gram_figure(task, 0, changed) == pytest.approx(found, rel=1e-6)


# --- the config -------------------------------------------------------------------------------------------------


def test_what_the_config_says_and_refuses() -> None:
    assert Gram.model_validate({"trigger": "dense_health"}).trigger == DenseHealth(on="dense_health")
    assert Gram().trigger is None
    for wrong, words in (
        ({"trigger": "by hand"}, "dense_health"),
        ({"trigger": {"on": "dense_health", "cosine_rise": None, "locality_drop": None}}, "set cosine_rise"),
        ({"clip_negatives": True, "form": "features"}, "P×P"),
        ({"teacher": "newest"}, "best"),
    ):
        with pytest.raises(ValidationError, match=words):
            Gram.model_validate(wrong)
    settings = {**BASE, "kind": "high_res", "resolutions": [{"global_size": 32, "local_size": 16, "p": 1}]}
    refined = HighRes.model_validate({**settings, "gram": {"weight": {"peak": 1.0}}})
    assert refined.gram.teacher == "latest", "the refinement is anchored to what it refines"
    assert HighRes.model_validate(settings).gram.weight.peak == 1.5
    with pytest.raises(ValidationError, match="trigger"):
        HighRes.model_validate({**settings, "gram": {"trigger": "dense_health"}})


# --- the lineage ------------------------------------------------------------------------------------------------


def finish(
    out: Path, steps: list[int], health: Mapping[int, tuple[float, float]], backbone: Path | None = None
) -> Lineage:
    """What a stage leaves: snapshots after `steps` that say where they come from, and metrics of some steps."""
    (out / "snapshots").mkdir(parents=True)
    for step in steps:
        (out / "snapshots" / f"step-{step:08d}.safetensors").write_text(f"{out.name} {step}")
    history = [
        {"step": step, "metrics": {"loss": 1.0, "cls_patch_cosine": cosine, "patch_locality": locality}}
        for step, (cosine, locality) in health.items()
    ]
    lineage.write(out, history, backbone)
    return lineage.read(out)


@pytest.fixture
def refined(tmp_path: Path) -> Path:
    """The artifact of the last of three stages; the others are gone."""
    finish(tmp_path / "pretrain", [10, 20, 30], {9: (0.2, 0.5), 20: (0.1, 0.6), 30: (0.4, 0.3)})
    finish(tmp_path / "gram", [5, 8], {5: (0.3, 0.4), 8: (0.3, 0.45)}, tmp_path / "pretrain")
    finish(tmp_path / "high", [2], {}, tmp_path / "gram")
    for stage in ("pretrain", "gram"):
        for file in (tmp_path / stage).rglob("*.safetensors"):
            file.unlink()
    return tmp_path / "high"


@pytest.mark.parametrize(
    ("wanted", "updates", "content"),
    [
        ("earliest", 10, "pretrain 10"), ("latest", 40, "high 2"), ("best", 20, "pretrain 20"),
        (30, 30, "pretrain 30"), (35, 35, "gram 5"), (38, 38, "gram 8"), (40, 40, "high 2"),
    ],
)  # fmt: skip
def test_snapshots_of_any_earlier_stage_can_be_anchored_to(
    refined: Path, wanted: int | str, updates: int, content: str
) -> None:
    snapshot = lineage.read(refined).pick(wanted)
    assert snapshot.updates == updates
    assert (refined / snapshot.file).read_text() == content


def test_a_snapshot_that_is_not_there_is_named_with_those_that_are(refined: Path) -> None:
    with pytest.raises(UserError, match="no snapshot after 25 updates") as caught:
        lineage.read(refined).pick(25)
    assert "10, 20, 30, 35, 38, 40" in str(caught.value.hint)
    with pytest.raises(UserError, match="dense health"):
        Lineage(snapshots=(Snapshot(updates=1, file="x"),)).pick("best")


def test_health_is_averaged_since_the_snapshot_before_over_a_hundred_steps_at_most(tmp_path: Path) -> None:
    metrics = {step: (step / 1000, 1.0 if step <= 300 else 0.5) for step in range(1, 331)}
    found = finish(tmp_path / "stage", [300, 330], metrics)
    first, second = (snapshot.health for snapshot in found.snapshots)
    assert first is not None
    assert second is not None
    assert first.cosine == pytest.approx(0.2505)  # steps 201 to 300
    assert second.cosine == pytest.approx(0.3155)  # steps 301 to 330
    assert (first.locality, second.locality) == (1.0, 0.5)
    assert first.score == pytest.approx(1.0 - 0.2505)


def test_the_stage_starts_from_the_snapshot_that_its_config_names(refined: Path) -> None:
    class Backbone:
        path = refined

    for teacher, updates in (("best", 20), (35, 35), ("latest", 40), ("start", 40)):
        config = GramAnchor.model_validate({**BASE, "gram": {"teacher": teacher}})
        path, health = config._gram_start(Backbone())  # type: ignore[arg-type]
        known = lineage.read(refined).pick(updates)
        assert (path, health) == (refined / known.file, known.health)


@pytest.mark.parametrize("file", ["/etc/hostname", "../secret", "snapshots/../../secret"])
def test_a_lineage_names_files_of_its_own_artifact_only(tmp_path: Path, refined: Path, file: str) -> None:
    (tmp_path / "secret").write_text("secret")
    known = json.loads((refined / "lineage.json").read_text())
    known["snapshots"][0]["file"] = file
    (refined / "lineage.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match="not an object name"):
        finish(tmp_path / "next", [1], {}, refined)
    assert "secret" not in [path.read_text() for path in (tmp_path / "next").rglob("*.safetensors")]
