"""What a student rebuilds from a bundle is what the teacher would have said about the global batch."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orchestrator.data.index import PhotoIndex, PhotoRow
from orchestrator.elastic import cluster
from orchestrator.elastic.job import Job
from orchestrator.elastic.task import BlockTensors
from orchestrator.models import normalise
from orchestrator.sharing.account import Account
from orchestrator.sharing.client import SharedBlocks
from orchestrator.spec import Cluster, Elastic, Optimizer, Schedule
from orchestrator.stages.base import Context
from orchestrator.stages.distill import Distill, Student, _sharing_gpus
from orchestrator.stages.selfsup import Heads, ModelRecipe
from orchestrator.stages.tasks.distill import DistillTask, FrozenTeacher
from orchestrator.stages.tasks.nets import HeadedBackbone, resize_masks
from orchestrator.store.artifact import Artifact, Manifest
from orchestrator.tracking.runs import NullRun

HEADS = Heads(
    hidden=24, dino_bottleneck=8, dino_prototypes=32, ibot_bottleneck=8, ibot_prototypes=48, prototype_std=0.3
)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
CONFIG = Distill.model_validate(
    {
        "kind": "distill", "students": {"small": {"model": "vit_femto"}, "other": {"model": "convnext_mini"}},
        "steps": 3, "batch_size": 8, "block_size": 4, "optimizer": {"lr": {"peak": 1e-3}},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    }
)  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(12):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60))
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
        rows.append(PhotoRow("photos", f"{number}.png", str(tmp_path), "", 80, 60))
    (tmp_path / "index").mkdir()
    PhotoIndex(rows).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    folder = tmp_path / "teacher" / "snapshots"
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "step-00000001.safetensors")
    return tmp_path / "teacher"


def sinkhorn(logits_NK: torch.Tensor, temperature: float) -> torch.Tensor:
    """The textbook algorithm, in float64, on the whole batch at once."""
    plan = (logits_NK.double() / temperature).exp().T
    plan /= plan.sum()
    for _ in range(3):
        plan /= plan.sum(dim=1, keepdim=True) * plan.shape[0]
        plan /= plan.sum(dim=0, keepdim=True) * plan.shape[1]
    return (plan * plan.shape[1]).T


def test_rebuilt_targets_equal_sinkhorn_of_the_whole_batch(index: Path, teacher: Path) -> None:
    frozen = FrozenTeacher(CONFIG, RECIPE, teacher, index, seed=5)
    bundle = frozen(2)
    assert frozen.images_forwarded == 8

    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    task = DistillTask(CONFIG, CONFIG.students["small"], RECIPE, teacher, seed=1)
    task.build("cpu")
    source = SharedBlocks("nobody", "small", 2)
    source._held = (2, bundle)
    blocks = []
    for number in range(2):
        block = source.load(2, number)
        blocks.append(BlockTensors(2, number, 1.0, {k: torch.from_numpy(v) for k, v in block.arrays.items()}))
    made = task.targets(blocks, lambda tensor: tensor)

    from orchestrator.elastic.export import load_export

    net.load_state_dict(dict(load_export(teacher / "snapshots" / "step-00000001.safetensors")))
    net.eval()
    with torch.no_grad():
        views = torch.from_numpy(bundle["globals"]).flatten(0, 1)
        features = net.backbone(normalise(views))
        dino = sinkhorn(net.dino_head(features.cls)[1], CONFIG.teacher_temperature)
        masked = torch.from_numpy(bundle["masks"]).flatten(0, 1)
        # The heads' rows are grouped by block; the masked tokens of block 0 come first.
        by_block = torch.cat([torch.arange(16).view(2, 8)[:, 4 * b : 4 * b + 4].flatten() for b in range(2)])
        tokens = torch.cat([features.patches[row][masked[row]] for row in by_block])
        ibot = sinkhorn(net.ibot_head(tokens)[1], CONFIG.teacher_temperature)
    got = torch.cat([target.dino for target in made], dim=1).flatten(0, 1)
    torch.testing.assert_close(got.double(), dino, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([t.ibot[0] for t in made]).double(), ibot, rtol=1e-4, atol=1e-6)
    assert float(dino.max()) > 2 / HEADS.dino_prototypes, "uniform targets would prove nothing"


def test_losses_of_both_architectures_are_finite_and_reach_every_parameter(
    index: Path, teacher: Path
) -> None:
    bundle = FrozenTeacher(CONFIG, RECIPE, teacher, index, seed=5)(0)
    for name, student in CONFIG.students.items():
        source = SharedBlocks("nobody", name, 2)
        source._held = (0, bundle)
        block = source.load(0, 0)
        tensors = BlockTensors(0, 0, 1.0, {k: torch.from_numpy(v) for k, v in block.arrays.items()})
        task = DistillTask(CONFIG, student, RECIPE, teacher, seed=1)
        modules = task.build("cpu")
        (target,) = task.targets([tensors], lambda tensor: tensor)
        losses = task.losses(tensors, target)
        losses.total.backward()
        assert {"dino_local", "dino_global", "ibot", "koleo"} == set(losses.figures)
        without = [
            n
            for n, p in modules.trainable.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
        ]
        assert without == [], name


def test_chunk_by_chunk_a_student_learns_the_same(index: Path, teacher: Path) -> None:
    """Both sides: the teacher's Sinkhorn scaling, and the student's losses and gradients."""
    found = {}
    for chunk_rows in (None, 5):
        config = CONFIG.model_copy(update={"chunk_rows": chunk_rows})
        bundle = FrozenTeacher(config, RECIPE, teacher, index, seed=5)(1)
        source = SharedBlocks("nobody", "small", 2)
        source._held = (1, bundle)
        block = source.load(1, 0)
        tensors = BlockTensors(1, 0, 1.0, {k: torch.from_numpy(v) for k, v in block.arrays.items()})
        torch.manual_seed(0)
        task = DistillTask(config, CONFIG.students["small"], RECIPE, teacher, seed=1)
        modules = task.build("cpu")
        losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
        losses.total.backward()
        gradients = {name: parameter.grad for name, parameter in modules.trainable.named_parameters()}
        found[chunk_rows] = bundle, losses, gradients
    (plain, whole, expected), (chunked, ours, gradients) = found.values()
    for name in ("step/dino_scaling", "step/ibot_scaling"):
        np.testing.assert_allclose(chunked[name], plain[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.total, whole.total, rtol=1e-5, atol=0)
    assert ours.figures.keys() == whole.figures.keys()
    for name, value in whole.figures.items():
        torch.testing.assert_close(ours.figures[name], value, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_masks_on_a_coarser_grid_cover_at_least_half() -> None:
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [0, 1, 4, 2]] = True  # three quarters of the first 2×2 cell, a quarter of the second
    assert resize_masks(masks, (4, 4), (2, 2)).tolist() == [[True, False, False, False]]
    assert resize_masks(masks, (4, 4), (4, 4)) is masks


def test_students_share_gpus_when_there_are_too_few() -> None:
    def job(workers: tuple[int, int]) -> Job:
        return Job(
            name="s", task=DistillTask, num_blocks=4, num_steps=1, optimizer=CONFIG.optimizer, zero_stage=3,
            precision="fp32", work=Path(), seed=0, elastic=Elastic(workers=workers),
        )  # fmt: skip

    jobs = {"a": job((1, 4)), "b": job((2, 2))}
    assert _sharing_gpus(jobs, 0) is jobs, "no GPUs, nothing to share"
    assert _sharing_gpus(jobs, 4) is jobs, "one is left for the teacher"
    for gpus, share in ((3, 0.9), (2, 0.45), (1, 0.3)):
        shared = _sharing_gpus(jobs, gpus)
        assert [made.gpus_per_worker for made in shared.values()] == [share, share]
        # A worker's share lies on one GPU, and the teacher finds its tenth on any of them.
        places = int(1 / share + 1e-9)
        assert places * gpus >= 3
        assert places * share <= 0.9 + 1e-9
        assert shared["a"].elastic.workers == (1, 1)


def make_context(tmp_path: Path, index: Path, teacher: Path) -> Context:
    def artifact(kind: str, path: Path) -> Artifact:
        manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
        return Artifact("f" * 64, kind, path, manifest)

    (teacher / "recipe.json").write_text(RECIPE.model_dump_json())
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    out.mkdir()
    return Context(
        name="distill", pipeline="p", seed=0, key="k", keys={}, sources={}, out=out, work=tmp_path / "work",
        inputs={"index": artifact("curate", index), "teacher": artifact("pretrain", teacher)},
        elastic=Elastic(workers=1, max_failures=0), run=NullRun(),
    )  # fmt: skip


def test_a_student_that_fails_fails_alone_and_is_trained_alone_the_next_time(
    index: Path, teacher: Path, tmp_path: Path
) -> None:
    """Two real jobs; minutes where the machine is busy, as it starts a cluster and warms two seats."""
    good, bad = CONFIG.students["small"], CONFIG.students["other"]
    hopeless = bad.model_copy(update={"optimizer": Optimizer(lr=Schedule(peak=1e30))})

    def config(student: Student) -> Distill:
        return CONFIG.model_copy(update={"students": {"good": good, "bad": student}, "steps": 6})

    context = make_context(tmp_path, index, teacher)
    with cluster.start(Cluster(), Distill.preload):
        with pytest.raises(RuntimeError, match="distill/bad failed: NonFiniteLossError"):
            config(hopeless).run(context)
        jobs = {name: config(bad)._job(context, name, RECIPE) for name in ("good", "bad")}
        assert jobs["good"].is_done(), "the other one goes on to its end"
        assert not jobs["bad"].is_done()
        trained = jobs["good"].export(6).stat().st_mtime_ns
        before = Account.load(context.work / "sharing.json")
        assert before.spans == [[0, 6]]
        assert before.stats().teacher_forwards_per_image == 1.0

        context = make_context(tmp_path, index, teacher)
        figures = config(bad).run(context)
        assert jobs["good"].export(6).stat().st_mtime_ns == trained, "what is done stays"
    for name in ("good", "bad"):
        assert 0 < figures[f"{name}_goodput"] <= 1
        assert (context.out / "students" / name / "model" / "model.safetensors").exists()
    assert figures["goodput"] == min(figures["good_goodput"], figures["bad_goodput"])
    counted = json.loads((context.out / "sharing.json").read_text())
    assert counted["images_needed"] == 6 * CONFIG.batch_size
    assert counted["images_forwarded"] == before.images_forwarded + 6 * CONFIG.batch_size, (
        "counted over drivers"
    )
