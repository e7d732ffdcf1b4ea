"""What a student rebuilds from a step's outputs is what the teacher would have said about the global batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.config.elastic import Elastic, Resources
from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.config.schema import Cluster
from orchestrator.data.index import ImageIndex
from orchestrator.data.views import CropConfig
from orchestrator.elastic import cluster
from orchestrator.errors import UserError
from orchestrator.models import load_pretrained, normalise, preset
from orchestrator.stages.base import Context
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.common.nets import HeadedBackbone, resize_masks
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.student_config import Student
from orchestrator.stages.distill.student_runs import sharing_gpus, student_job
from orchestrator.stages.distill.task import DistillTask, bytes_per_image
from orchestrator.stages.distill.teacher_kinds import HeadTeaching, teaching
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.payload import TEACHER, VIEWS
from orchestrator.tracking.run import NullRun
from orchestrator.training.job import Job

from .distilling import CONFIG, HEADS, RECIPE, frozen_teacher, tensors_of


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

    from orchestrator.training.export import load_export

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
        assert {"dino_local", "dino_global", "ibot", "koleo"} == set(losses.metrics)
        without = [
            n
            for n, p in modules.trainable.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()
        ]
        assert without == [], name


def test_koleo_takes_the_views_and_groups_that_it_is_told(index: Path, teacher: Path) -> None:
    """Against loops over the pairs of each group, on the CLS features that the student had."""
    tensors = tensors_of(frozen_teacher(CONFIG, teacher, index)(0), 0, 0)
    student = Student(model="vit_femto", mask_inputs=False)
    metrics = {}
    for which, group in (("first", None), ("both", None), ("first", 2), ("both", 2)):
        config = CONFIG.model_copy(update={"koleo_views": which, "koleo_group": group})
        torch.manual_seed(0)
        task = DistillTask(config, student, RECIPE, teacher, seed=1)
        net = task.build("cpu").trainable.eval()
        losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
        metrics[which, group] = losses.metrics["koleo"].item()
        with torch.no_grad():
            views = [net.backbone(normalise(pixels)).cls.double() for pixels in tensors.tensors["globals"]]
        wanted = sum(naive_koleo(view, group or 4) for view in (views if which == "both" else views[:1]))
        assert metrics[which, group] == pytest.approx(0.1 * wanted, rel=1e-3), (which, group)
    assert len({round(value, 6) for value in metrics.values()}) == 4


def naive_koleo(cls: torch.Tensor, group: int) -> float:
    rows = (cls / cls.norm(dim=1, keepdim=True)).numpy()
    distances = []
    for first in range(0, len(rows), group):
        part = rows[first : first + group]
        for one, row in enumerate(part):
            others = [np.linalg.norm(row - other) for two, other in enumerate(part) if two != one]
            distances.append(min(others))
    return float(-np.mean(np.log(distances)))


def test_a_student_has_its_own_average_and_shape(index: Path, teacher: Path, tmp_path: Path) -> None:
    """Its EMA by its own schedule; its overrides, not the teacher's, in what is built and left."""
    overrides = {"num_storage_tokens": 0, "key_bias": True, "norm_eps": 1e-6}
    student = Student.model_validate(
        {
            "model": "vit_femto",
            "model_overrides": overrides,
            "ema": {"peak": 0.9, "end": 1.0, "shape": "linear"},
        }
    )
    config = CONFIG.model_copy(update={"students": {"own": student, **CONFIG.students}})
    recipe = RECIPE.model_copy(update={"model_overrides": {"rope_rescale": 4.0}})
    task = DistillTask(config, student, recipe, teacher, seed=1)
    net = task.build("cpu").trainable
    assert net.backbone.config == replace(preset("vit_femto"), **overrides)

    momenta: list[float] = []

    class Weights:
        def update_ema(self, momentum: float) -> None:
            momenta.append(momentum)

    for step in range(3):
        task.after_step(step, Weights(), {})  # type: ignore[arg-type]
    assert momenta == pytest.approx([0.9, 0.9 + 0.1 / 3, 0.9 + 0.2 / 3])

    save_file(net.state_dict(), tmp_path / "export.safetensors")
    (tmp_path / "out").mkdir()
    taught = HeadTeaching.__new__(HeadTeaching)
    taught._config, taught.recipe = config, recipe
    taught.finish("own")(tmp_path / "export.safetensors", tmp_path / "out")
    kept = ModelRecipe.model_validate_json((tmp_path / "out" / "recipe.json").read_text())
    assert kept.model_overrides == overrides
    assert kept.tower == load_pretrained(tmp_path / "out" / "model").config == net.backbone.config


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
    assert ours.metrics.keys() == whole.metrics.keys()
    for name, value in whole.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert any((gradients[name] != gradient).any() for name, gradient in expected.items()), (
        "the gradients of one block have other last bits, before anything is summed exactly: the field says so"
    )
    said = Distill.model_fields["chunk_rows"].description or ""
    assert "A change alters results in their last bits, even with `elastic.exact`" in said
    assert Pretrain.model_fields["chunk_rows"].description == said


def test_masks_on_a_coarser_grid_cover_at_least_half() -> None:
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [0, 1, 4, 2]] = True  # three quarters of the first 2×2 cell, a quarter of the second
    assert resize_masks(masks, (4, 4), (2, 2)).tolist() == [[True, False, False, False]]
    assert resize_masks(masks, (4, 4), (4, 4)) is masks


def made_job(**elastic: Any) -> Job:
    return Job(
        name="distill/s", task=DistillTask, num_blocks=4, num_steps=1, optimizer=CONFIG.optimizer, zero_stage=3,
        precision="fp32", work=Path(), seed=0, elastic=Elastic(**elastic),
    )  # fmt: skip


def test_students_share_gpus_when_there_are_too_few() -> None:
    def job(workers: tuple[int, int]) -> Job:
        return made_job(workers=workers)

    jobs = {"a": job((1, 4)), "b": job((1, 1)), "c": job((1, 2))}
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
        (share,) = {made.resources.gpu for made in shared.values()}
        # A worker's share lies on one GPU, and so does a teacher's: fill the GPUs with both.
        free = [1.0] * gpus
        for need in sorted([each] * teachers + [share] * 3, reverse=True):
            place = next(number for number, left in enumerate(free) if left >= need - 1e-9)
            free[place] -= need
        assert shared["a"].elastic.workers == (1, 1)
    for gpus, teachers, each in ((1, 1, 1.0), (1, 10, 0.1)):
        with pytest.raises(UserError, match="leave none of 1 GPUs for students"):
            sharing_gpus(jobs, gpus, teachers, each)


def test_a_student_that_needs_two_workers_never_has_both_on_one_gpu() -> None:
    jobs = {"a": made_job(workers=1), "b": made_job(workers=2)}
    shared = sharing_gpus(jobs, 3, 1, 0.1)
    assert {name: made.resources.gpu for name, made in shared.items()} == {"a": 0.9, "b": 0.9}
    for gpus in (1, 2):
        with pytest.raises(UserError, match=r"\(b\) leave too few of \d GPUs") as caught:
            sharing_gpus(jobs, gpus, 1, 0.1)
        assert "workers to 1" in str(caught.value)


def test_a_student_that_says_its_share_of_a_gpu_gets_it() -> None:
    jobs = {"a": made_job(workers=1), "b": made_job(workers=1, resources={"gpu": 0.5})}
    shared = sharing_gpus(jobs, 2, 2, 0.5)
    assert shared["b"].resources.gpu == 0.5
    assert shared["a"].resources.gpu == 0.5, "beside a teacher"
    alone = {"b": jobs["b"]}
    assert sharing_gpus(alone, 1, 1, 0.5) is not alone, "a teacher takes a GPU to itself if it can"
    assert sharing_gpus(alone, 1, 1, 0.5)["b"].resources.gpu == 0.5


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


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "students" / name / "model" / "model.safetensors")


@pytest.mark.long
@pytest.mark.cluster
def test_a_student_that_fails_fails_alone_and_is_trained_alone_the_next_time(
    index: Path, teacher: Path, tmp_path: Path
) -> None:
    """Real jobs and two teacher actors; minutes where the machine is busy: it starts a cluster and warms slots."""
    good, bad = CONFIG.students["small"], CONFIG.students["other"]
    hopeless = bad.model_copy(update={"optimizer": Optimizer(lr=Schedule(peak=1e30))})

    def config(**students: Student) -> Distill:
        return CONFIG.model_copy(update={"students": students, "steps": 6, "teachers": 2})

    context = make_context(tmp_path, index, teacher)
    with cluster.start(Cluster(), Distill.preload):
        with pytest.raises(RuntimeError, match=r"bad: .*NonFiniteLossError.*; good finished and is kept"):
            config(good=good, bad=hopeless).run(context)
        before = TeacherCounters.load(context.work / "sharing.json")
        assert before.spans == [[0, 6]]
        assert before.stats().teacher_forwards_per_image == 1.0

        cached = {"teacher_cache": True}
        context = make_context(tmp_path, index, teacher)
        metrics = config(good=good, bad=bad).model_copy(update=cached).run(context)
        counted = json.loads((context.out / "sharing.json").read_text())
        assert counted["images_needed"] == 6 * CONFIG.batch_size
        again = counted["images_forwarded"] - before.images_forwarded
        assert again == 6 * CONFIG.batch_size, "counted over drivers, and the good one was not trained again"

        later = make_context(tmp_path, index, teacher)
        config(good=good, bad=bad, late=good).model_copy(update=cached).run(later)
        at_last = json.loads((later.out / "sharing.json").read_text())
        assert at_last["images_forwarded"] == counted["images_forwarded"], "what was said was kept"

        alone = make_context(tmp_path, index, teacher, work="elsewhere")
        # Its teacher is spread over two processes, which nobody should see.
        config(good=good, late=good).model_copy(update={"teachers": 1, "teacher_shards": 2}).run(alone)
    for name in ("good", "bad"):
        assert 0 < metrics[f"{name}_goodput"] <= 1
        assert (context.out / "students" / name / "model" / "model.safetensors").exists()
    assert metrics["goodput"] == min(metrics["good_goodput"], metrics["bad_goodput"])
    for student in ("good", "late"):
        found, wanted = weights(later.out, student), weights(alone.out, student)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_a_student_has_an_identity_of_its_own() -> None:
    one = CONFIG.student_identity("small")
    more = CONFIG.model_copy(update={"students": {**CONFIG.students, "third": Student(model="vit_femto")}})
    assert more.student_identity("small") == one
    assert more.student_identity("other") != one
    faster = CONFIG.model_copy(
        update={"teachers": 3, "window": 9, "teacher_cache": True, "views": "regenerated"}
    )
    assert faster.student_identity("small") == one, "how it is run is not part of it"
    longer = CONFIG.model_copy(update={"steps": 4})
    assert longer.student_identity("small") != one


def test_what_a_teacher_said_of_other_pixels_is_not_cached(
    index: Path, teacher: Path, tmp_path: Path
) -> None:
    context = make_context(tmp_path, index, teacher)

    def kept(**changes: Any) -> set[Path]:
        config = CONFIG.model_validate({**CONFIG.model_dump(by_alias=True), "teacher_cache": True, **changes})
        before = set((context.work / "parts").glob("*"))
        teaching(config, context, 0).factory(list(config.students.values()), 2)
        return set((context.work / "parts").glob("*")) - before

    assert kept()
    assert not kept(image_cache_gib=1.0)
    assert kept(cached_side=64)
    assert kept(cached_side=96)


def test_what_a_teacher_says_is_as_large_as_predicted(index: Path, teacher: Path) -> None:
    said = [frozen_teacher(CONFIG, teacher, index)(step)[TEACHER] for step in range(20)]
    measured = np.mean([sum(array.nbytes for array in one.values()) for one in said]) / CONFIG.batch_size
    assert bytes_per_image(CONFIG, RECIPE) == pytest.approx(measured, rel=0.1)


def test_at_the_papers_sizes_an_image_takes_less_than_70_kilobytes() -> None:
    heads = Heads(
        hidden=8192, dino_bottleneck=512, dino_prototypes=262_144, ibot_bottleneck=384, ibot_prototypes=98_304
    )
    config = CONFIG.model_copy(
        update={"precision": "bf16", "batch_size": 2048, "block_size": 16, "crops": CropConfig()}
    )
    recipe = ModelRecipe(model="vit_7b", drop_path=0.0, heads=heads, global_size=256)
    assert 50_000 < bytes_per_image(config, recipe) < 70_000


def test_processes_of_one_teacher_never_share_a_gpu() -> None:
    sharded = CONFIG.model_copy(update={"teacher_shards": 2})
    with pytest.raises(UserError, match="2 processes of one teacher"):
        sharded.check_shards(4, "stages.distill.teacher_gpus")
    sharded.check_shards(0, "on CPUs, gloo connects them")
    sharded.model_copy(update={"teacher_gpus": 1.0}).check_shards(4, "one each")
    CONFIG.check_shards(4, "one process")


def test_a_student_says_itself_what_its_workers_need(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={
            "students": {
                "plain": Student(model="vit_femto"),
                "own": Student.model_validate(
                    {"model": "vit_femto", "workers": "auto", "resources": {"gpu": 2, "labels": {}}}
                ),
            }
        }
    )
    ImageIndex([]).save(tmp_path)
    context = replace(
        make_context(tmp_path, tmp_path, tmp_path),
        elastic=Elastic.model_validate(
            {"workers": 3, "resources": {"memory": "1GiB", "labels": {"pool": "spot"}}}
        ),
    )
    teach = teaching(config, context, 0)
    jobs = {}
    for name in config.students:
        with context.part("student", config.student_identity(name)) as part:
            jobs[name] = student_job(config, context, teach, name, part)
    assert jobs["plain"].elastic == context.elastic
    assert jobs["own"].resources == Resources(gpu=2, memory=2**30)
    assert jobs["own"].elastic.every_device
