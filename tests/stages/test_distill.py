"""What a student rebuilds from a bundle is what the teacher would have said about the global batch."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.data.blocks import Block, CropBlocks
from orchestrator.data.index import PhotoIndex, PhotoRow
from orchestrator.data.views import CropConfig
from orchestrator.elastic import cluster
from orchestrator.elastic.job import Job
from orchestrator.elastic.task import BlockTensors
from orchestrator.errors import UserError
from orchestrator.models import normalise
from orchestrator.sharing.account import Account
from orchestrator.sharing.bundle import TEACHER, VIEWS, Parts, block
from orchestrator.spec import Cluster, Elastic, Optimizer, Schedule
from orchestrator.stages.base import Context
from orchestrator.stages.distill import Distill, Student, Views
from orchestrator.stages.selfsup import Heads, ModelRecipe
from orchestrator.stages.students import sharing_gpus
from orchestrator.stages.tasks.crops import StepViews, regenerated_views
from orchestrator.stages.tasks.distill import DistillTask, FrozenTeacher, bytes_per_image
from orchestrator.stages.tasks.nets import HeadedBackbone, resize_masks
from orchestrator.stages.tasks.teaching import view_part
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


def frozen_teacher(
    config: Distill, teacher: Path, index: Path, views: dict[str, CropConfig] | None = None
) -> FrozenTeacher:
    sets = {VIEWS: config.crops} if views is None else views
    return FrozenTeacher(config, RECIPE, teacher, partial(StepViews, config, RECIPE, index, 5, sets))


def tensors_of(
    parts: Parts, step: int, index: int, names: tuple[str, ...] = (TEACHER, VIEWS)
) -> BlockTensors:
    """A block as the student's worker gets it."""
    arrays = {name: array for part in names for name, array in block(parts[part], index, 2)[1].items()}
    return BlockTensors(step, index, 1.0, {name: torch.from_numpy(array) for name, array in arrays.items()})


def sinkhorn(logits_NK: torch.Tensor, temperature: float) -> torch.Tensor:
    """The textbook algorithm, in float64, on the whole batch at once."""
    plan = (logits_NK.double() / temperature).exp().T
    plan /= plan.sum()
    for _ in range(3):
        plan /= plan.sum(dim=1, keepdim=True) * plan.shape[0]
        plan /= plan.sum(dim=0, keepdim=True) * plan.shape[1]
    return (plan * plan.shape[1]).T


def test_rebuilt_targets_equal_sinkhorn_of_the_whole_batch(index: Path, teacher: Path) -> None:
    frozen = frozen_teacher(CONFIG, teacher, index)
    parts = frozen(2)
    assert frozen.images_forwarded == 8

    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    task = DistillTask(CONFIG, CONFIG.students["small"], RECIPE, teacher, seed=1)
    task.build("cpu")
    blocks = [tensors_of(parts, 2, number) for number in range(2)]
    made = task.targets(blocks, lambda tensor: tensor)

    from orchestrator.elastic.export import load_export

    net.load_state_dict(dict(load_export(teacher / "snapshots" / "step-00000001.safetensors")))
    net.eval()
    with torch.no_grad():
        views = torch.from_numpy(parts[VIEWS]["globals"]).flatten(0, 1)
        features = net.backbone(normalise(views))
        dino = sinkhorn(net.dino_head(features.cls)[1], CONFIG.teacher_temperature)
        masked = torch.from_numpy(parts[TEACHER]["masks"]).flatten(0, 1)
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
    parts = frozen_teacher(CONFIG, teacher, index)(0)
    for name, student in CONFIG.students.items():
        tensors = tensors_of(parts, 0, 0)
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
        parts = frozen_teacher(config, teacher, index)(1)
        tensors = tensors_of(parts, 1, 0)
        torch.manual_seed(0)
        task = DistillTask(config, CONFIG.students["small"], RECIPE, teacher, seed=1)
        modules = task.build("cpu")
        losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
        losses.total.backward()
        gradients = {name: parameter.grad for name, parameter in modules.trainable.named_parameters()}
        found[chunk_rows] = parts[TEACHER], losses, gradients
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
    assert sharing_gpus(jobs, 0, 1, 0.1) is jobs, "no GPUs, nothing to share"
    assert sharing_gpus(jobs, 4, 1, 0.1) is jobs, "one is left for the teacher"
    assert sharing_gpus(jobs, 5, 2, 1.0) is jobs
    assert sharing_gpus({}, 4, 1, 0.1) == {}, "nobody to share with"
    for gpus, teachers, each in (
        (3, 1, 0.1),
        (2, 1, 0.1),
        (1, 1, 0.1),
        (2, 3, 0.2),
        (4, 2, 1.0),
        (2, 1, 1.0),
    ):
        shared = sharing_gpus(jobs, gpus, teachers, each)
        (share,) = {made.gpus_per_worker for made in shared.values()}
        # A worker's share lies on one GPU, and so does a teacher's: fill the GPUs with both.
        free = [1.0] * gpus
        for need in sorted([each] * teachers + [share] * 3, reverse=True):
            place = next(number for number, left in enumerate(free) if left >= need - 1e-9)
            free[place] -= need
        assert shared["a"].elastic.workers == (1, 1)
    for gpus, teachers, each in ((1, 1, 1.0), (1, 10, 0.1)):
        with pytest.raises(UserError, match="leave none of 1 GPUs for students"):
            sharing_gpus(jobs, gpus, teachers, each)


def make_context(tmp_path: Path, index: Path, teacher: Path, work: str = "work") -> Context:
    def artifact(kind: str, path: Path) -> Artifact:
        manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
        return Artifact("f" * 64, kind, path, manifest)

    (teacher / "recipe.json").write_text(RECIPE.model_dump_json())
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    out.mkdir()
    return Context(
        name="distill", pipeline="p", seed=0, key="k", keys={}, sources={}, out=out, work=tmp_path / work,
        inputs={"index": artifact("curate", index), "teacher": artifact("pretrain", teacher)},
        elastic=Elastic(workers=1, max_failures=0), run=NullRun(),
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "students" / "good" / "model" / "model.safetensors")


def test_a_student_that_fails_fails_alone_and_is_trained_alone_the_next_time(
    index: Path, teacher: Path, tmp_path: Path
) -> None:
    """Real jobs and two teacher actors; minutes where the machine is busy, as it starts a cluster and warms seats."""
    good, bad = CONFIG.students["small"], CONFIG.students["other"]
    hopeless = bad.model_copy(update={"optimizer": Optimizer(lr=Schedule(peak=1e30))})

    def config(**students: Student) -> Distill:
        return CONFIG.model_copy(update={"students": students, "steps": 6, "teachers": 2})

    context = make_context(tmp_path, index, teacher)
    with cluster.start(Cluster(), Distill.preload):
        with pytest.raises(RuntimeError, match=r"bad: .*NonFiniteLossError.*; good finished and is kept"):
            config(good=good, bad=hopeless).run(context)
        before = Account.load(context.work / "sharing.json")
        assert before.spans == [[0, 6]]
        assert before.stats().teacher_forwards_per_image == 1.0

        context = make_context(tmp_path, index, teacher)
        figures = config(good=good, bad=bad).run(context)
        counted = json.loads((context.out / "sharing.json").read_text())
        assert counted["images_needed"] == 6 * CONFIG.batch_size
        again = counted["images_forwarded"] - before.images_forwarded
        assert again == 6 * CONFIG.batch_size, "counted over drivers, and the good one was not trained again"

        alone = make_context(tmp_path, index, teacher, work="elsewhere")
        # Its teacher is spread over two processes, which nobody should see.
        config(good=good).model_copy(update={"teachers": 1, "teacher_shards": 2}).run(alone)
    for name in ("good", "bad"):
        assert 0 < figures[f"{name}_goodput"] <= 1
        assert (context.out / "students" / name / "model" / "model.safetensors").exists()
    assert figures["goodput"] == min(figures["good_goodput"], figures["bad_goodput"])
    beside, lonely = weights(context.out), weights(alone.out)
    for name, value in lonely.items():
        torch.testing.assert_close(beside[name], value, rtol=1e-5, atol=1e-7)


def test_a_student_has_an_identity_of_its_own() -> None:
    one = CONFIG.student_identity("small")
    more = CONFIG.model_copy(update={"students": {**CONFIG.students, "third": Student(model="vit_femto")}})
    assert more.student_identity("small") == one
    assert more.student_identity("other") != one
    faster = CONFIG.model_copy(update={"teachers": 3, "window": 9, "replay": True, "views": "regenerated"})
    assert faster.student_identity("small") == one, "how it is run is no part of it"
    longer = CONFIG.model_copy(update={"steps": 4})
    assert longer.student_identity("small") != one


OWN = Student(model="vit_femto", views=Views(global_size=64, num_local=1))


def with_own_views(**more: object) -> Distill:
    """A student with larger views beside one without; nothing is distorted, so that views can be compared."""
    plain = {
        "jitter_probability": 0,
        "gray_probability": 0,
        "blur_probability": (0, 0),
        "solarize_probability": 0,
    }
    crops = CONFIG.crops.model_copy(update={**plain, "local_blur_probability": 0})
    return CONFIG.model_copy(
        update={"students": {"small": CONFIG.students["small"], "own": OWN}, "crops": crops, **more}
    )


def test_own_sizes_are_cut_from_the_same_boxes(index: Path, teacher: Path) -> None:
    config = with_own_views()
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    assert set(sets) == {"views", "views/64-16-1"}
    parts = frozen_teacher(config, teacher, index, sets)(1)
    small, large = parts["views"], parts["views/64-16-1"]
    assert large["globals"].shape[-2:] == (64, 64)
    assert (small["locals"].shape[0], large["locals"].shape[0]) == (2, 1)
    np.testing.assert_array_equal(small["locals"][:1], large["locals"])
    flat = large["globals"].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1)
    shrunk = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in flat])
    other = small["globals"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    gap = np.abs(shrunk.astype(float) - other).mean(axis=(1, 2, 3))
    strangers = np.abs(shrunk.astype(float) - other[::-1]).mean(axis=(1, 2, 3))
    assert gap.max() < 0.3 * strangers.mean(), "the same boxes of the same photographs"


def test_views_of_unlike_sizes_share_boxes_in_jpegs_that_are_decoded_at_unlike_sizes(tmp_path: Path) -> None:
    """And a sibling's views change no pixel of another's."""
    rng = np.random.default_rng(2)
    rows = []
    for number in range(8):
        pixels = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (701, 523))
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), pixels)
        rows.append(PhotoRow("photos", f"{number}.jpg", str(tmp_path), "", 701, 523))
    (tmp_path / "index").mkdir()
    PhotoIndex(rows).save(tmp_path / "index")
    plain = with_own_views()
    large = Student(model="vit_femto", views=Views(global_size=160))
    config = plain.model_copy(update={"students": {"small": CONFIG.students["small"], "own": large}})
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    assert config.crops_of(large).min_side > 2 * config.crops.min_side
    parts = StepViews(config, RECIPE, tmp_path / "index", 5, sets).parts(0)
    alone = StepViews(plain, RECIPE, tmp_path / "index", 5, {VIEWS: plain.crops}).parts(0)
    for name, array in alone[VIEWS].items():
        np.testing.assert_array_equal(parts[VIEWS][name], array)
    small = parts[VIEWS]["globals"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(float)
    flat = parts["views/160-16-2"]["globals"].reshape(-1, 3, 160, 160).transpose(0, 2, 3, 1)
    shrunk = np.stack([cv2.resize(one, (32, 32), interpolation=cv2.INTER_AREA) for one in flat]).astype(float)
    gap = np.abs(shrunk - small).mean(axis=(1, 2, 3))
    strangers = np.abs(shrunk - small[::-1]).mean(axis=(1, 2, 3))
    assert gap.max() < 0.2 * strangers.min()


def test_a_student_with_own_sizes_learns_from_the_teachers_grid(index: Path, teacher: Path) -> None:
    config = with_own_views()
    sets = {view_part(config, OWN): config.crops_of(OWN)}
    parts = frozen_teacher(config, teacher, index, sets)(0)
    assert set(parts) == {TEACHER, "views/64-16-1"}, "views that nobody fetches are not made"
    tensors = tensors_of(parts, 0, 1, (TEACHER, "views/64-16-1"))
    task = DistillTask(config, OWN, RECIPE, teacher, seed=1)
    task.build("cpu")
    losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
    assert losses.total.isfinite()


def test_views_that_were_expected_are_those_that_are_asked_for(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was expected, and in whatever order steps come; nothing is made twice that was expected rightly."""
    config = with_own_views(teacher_threads=3)
    sets = {view_part(config, one): config.crops_of(one) for one in config.students.values()}
    made: list[int] = []
    load = CropBlocks.load

    def counting(self: CropBlocks, step: int, index: int) -> Block:
        made.append(step)
        return load(self, step, index)

    plain = {step: StepViews(config, RECIPE, index, 5, sets).parts(step) for step in (0, 1, 4)}
    monkeypatch.setattr(CropBlocks, "load", counting)
    views = StepViews(config, RECIPE, index, 5, sets)
    for step, expected in ((0, 1), (1, 2), (4, 5), (1, 0), (0, None)):
        blocks, parts = views.blocks(step), views.parts(step)
        if expected is not None:
            views.expect(expected)
        assert [block.step for block in blocks] == [step, step]
        for part, bundle in plain[step].items():
            for name, array in bundle.items():
                np.testing.assert_array_equal(parts[part][name], array)
    # Two blocks of two sets each.
    assert made.count(1) == 2 * 4, "the first time it had been expected, the second time not"
    assert made.count(4) == 4


def test_regenerated_views_are_those_that_would_have_been_shared(index: Path, teacher: Path) -> None:
    config = with_own_views()
    for student in config.students.values():
        crops = config.crops_of(student)
        parts = frozen_teacher(config, teacher, index, {VIEWS: crops})(2)
        own = regenerated_views(config, index, 5, crops).load(2, 1)
        _, shared = block(parts[VIEWS], 1, 2)
        assert set(own.arrays) == {"globals", "locals"}
        for name, array in shared.items():
            np.testing.assert_array_equal(own.arrays[name], array)


def test_what_a_teacher_says_is_as_large_as_predicted(index: Path, teacher: Path) -> None:
    said = [frozen_teacher(CONFIG, teacher, index)(step)[TEACHER] for step in range(20)]
    measured = np.mean([sum(array.nbytes for array in one.values()) for one in said]) / CONFIG.batch_size
    assert bytes_per_image(CONFIG, RECIPE) == pytest.approx(measured, rel=0.1)


def test_at_the_papers_sizes_an_image_takes_less_than_70_kilobytes() -> None:
    heads = Heads(
        hidden=8192, dino_bottleneck=512, dino_prototypes=262_144, ibot_bottleneck=384, ibot_prototypes=98_304
    )
    config = CONFIG.model_copy(
        update={"precision": "bf16", "batch_size": 2048, "crops": CropConfig(), "mask_ratio": (0.1, 0.5)}
    )
    recipe = ModelRecipe(model="vit_7b", drop_path=0.0, heads=heads, global_size=256)
    assert 50_000 < bytes_per_image(config, recipe) < 70_000
