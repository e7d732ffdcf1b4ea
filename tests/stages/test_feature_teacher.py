"""What headless teachers say, and what students make of it, against the formulas written out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.errors import UserError
from orchestrator.models import build, load_pretrained, normalise, save_pretrained
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.feature_task import FeatureTask
from orchestrator.stages.distill.feature_teacher import FeatureTeacher, bytes_per_image, prepare
from orchestrator.stages.distill.features import FeatureObjective, TeacherShape
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.teacher_service.payload import TEACHER, VIEWS, block
from orchestrator.training.task import BlockTensors

from .small import BASE, HEADS

CONFIG = Distill.model_validate(
    {
        **BASE,
        "kind": "distill",
        "students": {"vit": {"model": "vit_femto"}, "cnn": {"model": "convnext_mini"}},
    }
)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.fixture
def views(index: Path) -> partial[StepViews]:
    return partial(StepViews, CONFIG, RECIPE, index, 5, {VIEWS: CONFIG.crops})


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(3)
    for name in ("vit_femto", "convnext_mini"):
        save_pretrained(tmp_path / name, build(name).state_dict(), name)
    return {"a": tmp_path / "vit_femto", "b": tmp_path / "convnext_mini"}


def objective(folders: dict[str, Path], **fields: Any) -> FeatureObjective:
    teachers = {
        "a": {"from": folders["a"], "weight": 2.0},
        "b": {"from": folders["b"], "size": 48, "mean": MEAN, "std": STD, "weight": 0.5},
    }
    return FeatureObjective.model_validate({"teachers": teachers, **fields})


def test_each_teacher_says_what_it_says_of_its_own_input(
    views: partial[StepViews], folders: dict[str, Path]
) -> None:
    teacher = make_teacher(objective(folders), views)
    parts = teacher(3)
    said, seen = parts[TEACHER], parts[VIEWS]["globals"]
    assert teacher.images_forwarded == CONFIG.batch_size
    shapes = {name: array.shape for name, array in said.items()}
    assert shapes == {
        "a.cls": (2, 8, 48), "a.patches": (2, 8, 16, 48), "b.cls": (2, 8, 192), "b.patches": (2, 8, 9, 192), "ids": (8,)
    }  # fmt: skip
    pixels = torch.from_numpy(seen).flatten(0, 1)
    larger = F.interpolate(pixels.float() / 255, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
    inputs = {
        "a": normalise(pixels),
        "b": (larger - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None],
    }
    for name, folder in folders.items():
        with torch.no_grad():
            wanted = load_pretrained(folder)(inputs[name])
        for part in ("cls", "patches"):
            got = torch.from_numpy(said[f"{name}.{part}"]).flatten(0, 1)
            torch.testing.assert_close(got, getattr(wanted, part), rtol=1e-4, atol=1e-5)


def test_a_step_follows_from_its_number_alone(views: partial[StepViews], folders: dict[str, Path]) -> None:
    whitened = objective(folders, whiten=True, whiten_images=12, dtype="fp16")
    prepared = prepare(CONFIG, whitened, views)
    first, second = (FeatureTeacher(CONFIG, whitened, views, prepared) for _ in range(2))
    first(0)
    for name, array in first(7)[TEACHER].items():
        np.testing.assert_array_equal(second(7)[TEACHER][name], array)
        assert array.dtype == (np.int64 if name == "ids" else np.float16)


@pytest.mark.heavy
def test_whitened_features_are_on_one_scale(views: partial[StepViews], folders: dict[str, Path]) -> None:
    raw, white = (
        make_teacher(objective(folders, whiten=on, **({"whiten_images": 24} if on else {})), views)
        for on in (False, True)
    )
    for name in ("a.cls", "a.patches", "b.cls", "b.patches"):
        plain, made = (
            np.concatenate(
                [
                    one(step)[TEACHER][name].reshape(-1, one(step)[TEACHER][name].shape[-1])
                    for step in range(3)
                ]
            )
            for one in (raw, white)
        )
        np.testing.assert_allclose(made.mean(0), 0, atol=2e-2, err_msg=name)
        assert made.var() == pytest.approx(1, rel=1e-2), name
        ratios = np.linalg.norm(made[1:] - made[:-1], axis=1) / np.linalg.norm(plain[1:] - plain[:-1], axis=1)
        np.testing.assert_allclose(ratios, ratios.mean(), rtol=1e-2, err_msg=name)


def test_what_was_prepared_is_kept(
    views: partial[StepViews], folders: dict[str, Path], tmp_path: Path
) -> None:
    whitened = objective(folders, whiten=True, whiten_images=8)
    made = prepare(CONFIG, whitened, views, cache=tmp_path / "cache")
    assert made.shapes == {"a": TeacherShape(dim=48, grid=(4, 4)), "b": TeacherShape(dim=192, grid=(3, 3))}
    found = prepare(
        CONFIG, objective({"a": Path("gone"), "b": Path("gone")}), views, cache=tmp_path / "cache"
    )
    assert found.shapes == made.shapes
    assert found.whitening.keys() == made.whitening.keys() == {"a.cls", "a.patches", "b.cls", "b.patches"}
    own, kept = (FeatureTeacher(CONFIG, whitened, views, one)(1)[TEACHER] for one in (made, found))
    for name, array in own.items():
        np.testing.assert_array_equal(kept[name], array)
    per_image = sum(array.nbytes for array in own.values()) / CONFIG.batch_size
    assert bytes_per_image(CONFIG, whitened, made.shapes) == per_image


def test_the_own_artifact_as_a_headless_teacher(views: partial[StepViews], folders: dict[str, Path]) -> None:
    own = make_teacher(FeatureObjective(), views, folders["a"])(2)[TEACHER]
    named = make_teacher(objective(folders), views)(2)[TEACHER]
    for part in ("cls", "patches"):
        np.testing.assert_array_equal(own[f"self.{part}"], named[f"a.{part}"])


def test_a_size_that_the_teacher_cannot_take(views: partial[StepViews], folders: dict[str, Path]) -> None:
    wrong = FeatureObjective.model_validate({"teachers": {"a": {"from": folders["a"], "size": 36}}})
    with pytest.raises(UserError, match="the teacher 'a': it cannot take images of 36 x 36 pixels") as caught:
        prepare(CONFIG, wrong, views)
    assert caught.value.where == "features.teachers.a"


def test_features_without_scale_cannot_be_whitened(views: partial[StepViews]) -> None:
    constant = FeatureObjective.model_validate(
        {"teachers": {"flat": {"module": f"{__name__}:Flat"}}, "whiten": True, "whiten_images": 8}
    )
    with pytest.raises(UserError, match=r"flat\.cls cannot be whitened: all features are the same"):
        prepare(CONFIG, constant, views)


class Flat(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x), 4, 2, 2)


def make_teacher(
    wanted: FeatureObjective, views: partial[StepViews], own: Path | None = None
) -> FeatureTeacher:
    return FeatureTeacher(CONFIG, wanted, views, prepare(CONFIG, wanted, views, own), own)


# --- the student's side ------------------------------------------------------------------------------------------


def first_block(parts: Any) -> BlockTensors:
    arrays: dict[str, Any] = {}
    for part in parts.values():
        arrays |= block(part, 0, 2)[1]
    return BlockTensors(
        3, 0, 1.0, {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    )


def feature_loss(said: Tensor, wanted: Tensor, cosine_weight: float) -> Tensor:
    said, wanted = said.double().flatten(0, -2), wanted.double().flatten(0, -2)
    cosine = (said * wanted).sum(-1) / (said.norm(dim=-1) * wanted.norm(dim=-1))
    gap = (said - wanted).abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5)
    return cosine_weight * (1 - cosine.mean()) + (1 - cosine_weight) * smooth.mean()


def bilinear(patches: Tensor, before: int, after: int) -> Tensor:
    maps = patches.double().transpose(-1, -2).unflatten(-1, (before, before))
    return F.interpolate(maps, (after, after), mode="bilinear", antialias=True).flatten(-2).transpose(-1, -2)


def test_a_teacher_has_weights_of_its_own(views: partial[StepViews], folders: dict[str, Path]) -> None:
    """Those that it does not have are the objective's; what has none is neither measured, sent nor projected."""
    fields = {"cls_weight": 0.5, "patch_weight": 2.0, "whiten": True, "whiten_images": 8}
    plain = objective(folders, **fields)
    teachers = {
        "a": plain.teachers["a"].model_copy(update={"cls_weight": 0.0, "patch_weight": 3.0}),
        "b": plain.teachers["b"].model_copy(update={"patch_weight": 0.0}),
    }
    wanted = plain.model_copy(update={"teachers": teachers})
    prepared = prepare(CONFIG, wanted, views)
    assert prepared.whitening.keys() == {"a.patches", "b.cls"}
    teacher = FeatureTeacher(CONFIG, wanted, views, prepared)
    said, all_said = teacher(3)[TEACHER], make_teacher(plain, views)(3)[TEACHER]
    assert said.keys() == {"a.patches", "b.cls", "ids"}
    for name, array in said.items():
        np.testing.assert_array_equal(array, all_said[name])
    sizes = sum(array.nbytes for array in said.values()) / CONFIG.batch_size
    assert bytes_per_image(CONFIG, wanted, prepared.shapes) == sizes

    tensors = first_block(teacher(3))
    task = FeatureTask(CONFIG, CONFIG.students["vit"], wanted, prepared.shapes, seed=1)
    net = task.build("cpu").trainable.eval()
    assert (net.cls_heads.keys(), net.patch_heads.keys()) == ({"of_b"}, {"of_a"})
    losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    with torch.no_grad():
        seen = net.backbone(normalise(tensors.tensors["globals"].flatten(0, 1)))
        patches, cls = net.patch_heads["of_a"](seen.patches), net.cls_heads["of_b"](seen.cls)
    total = 2.0 * 3.0 * feature_loss(patches, tensors.tensors["a.patches"].flatten(0, 1), 0.9)
    total += 0.5 * 0.5 * feature_loss(cls, tensors.tensors["b.cls"].flatten(0, 1), 0.9)
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("student", ["vit", "cnn"])
@pytest.mark.parametrize("hidden", [None, 7])
def test_the_loss_is_the_weighted_sum_of_the_formulas(
    student: str, hidden: int | None, views: partial[StepViews], folders: dict[str, Path]
) -> None:
    wanted = objective(
        folders, cosine_weight=0.7, cls_weight=1.5, patch_weight=0.25, local_weight=0.5, hidden=hidden
    )
    tensors = first_block(make_teacher(wanted, views)(3))
    task = FeatureTask(
        CONFIG, CONFIG.students[student], wanted, prepare(CONFIG, wanted, views).shapes, seed=1
    )
    net = task.build("cpu").trainable.eval()
    (target,) = task.targets([tensors], lambda tensor: tensor)
    losses = task.losses(tensors, target)
    losses.total.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []

    said = tensors.tensors
    with torch.no_grad():
        of_globals = net.backbone(normalise(said["globals"].flatten(0, 1)))
        of_locals = net.backbone(normalise(said["locals"].flatten(0, 1)))
    own = {"vit": 4, "cnn": 2}[student]
    total = torch.zeros((), dtype=torch.float64)
    for name, weight, grid in (("a", 2.0, 4), ("b", 0.5, 3)):
        cls, patches = said[f"{name}.cls"], said[f"{name}.patches"].flatten(0, 1)
        common = min(own, grid)
        cls_head, patch_head = net.cls_heads[f"of_{name}"], net.patch_heads[f"of_{name}"]
        rows = bilinear(of_globals.patches, own, common).float()
        local = cls_head(of_locals.cls).unflatten(0, (-1, 4))
        terms = {
            "cls": 1.5 * feature_loss(cls_head(of_globals.cls), cls.flatten(0, 1), 0.7),
            "patches": 0.25 * feature_loss(patch_head(rows), bilinear(patches, grid, common), 0.7),
            "local": 0.5 * feature_loss(local, cls.mean(0).expand_as(local), 0.7),
        }
        for term, value in terms.items():
            torch.testing.assert_close(
                losses.metrics[f"{name}_{term}"].double(), weight * value, rtol=1e-4, atol=1e-6
            )
            total = total + weight * value
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "terms", "heads"),
    [
        ({"patch_weight": 0}, {"cls"}, {"cls_heads"}),
        ({"cls_weight": 0}, {"patches"}, {"patch_heads"}),
        ({"cls_weight": 0, "patch_weight": 0, "local_weight": 1}, {"local"}, {"cls_heads"}),
    ],
)
def test_what_has_no_weight_is_not_there(
    fields: dict[str, Any],
    terms: set[str],
    heads: set[str],
    views: partial[StepViews],
    folders: dict[str, Path],
) -> None:
    wanted = objective(folders, **fields)
    tensors = first_block(make_teacher(wanted, views)(3))
    task = FeatureTask(CONFIG, CONFIG.students["vit"], wanted, prepare(CONFIG, wanted, views).shapes, seed=1)
    net = task.build("cpu").trainable
    losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
    losses.total.backward()
    assert losses.metrics.keys() == {f"{name}_{term}" for name in "ab" for term in terms}
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"backbone", *heads}
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    views: partial[StepViews], folders: dict[str, Path]
) -> None:
    wanted = FeatureObjective(local_weight=0.0)
    tensors = first_block(make_teacher(wanted, views, folders["a"])(3))
    shapes = prepare(CONFIG, wanted, views, own=folders["a"]).shapes
    task = FeatureTask(CONFIG, CONFIG.students["vit"], wanted, shapes, seed=1)
    net = task.build("cpu").trainable.eval()
    net.backbone.load_state_dict(load_pretrained(folders["a"]).state_dict())
    for head in (net.cls_heads["of_self"], net.patch_heads["of_self"]):
        with torch.no_grad():
            head.weight.copy_(torch.eye(48))
            head.bias.zero_()
    losses = task.losses(tensors, task.targets([tensors], lambda tensor: tensor)[0])
    assert float(losses.total.detach()) == pytest.approx(0, abs=1e-5)
