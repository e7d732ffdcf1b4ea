"""Students that are networks from elsewhere: what is refused, what decides a key, what is learnt and what is left."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

import orchestrator
from orchestrator.errors import UserError
from orchestrator.models import load_pretrained, normalise
from orchestrator.stages.common.mlmodel import width
from orchestrator.stages.distill import student_backbone
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.feature_task import FeatureTask
from orchestrator.stages.distill.features import FeatureObjective, TeacherShape
from orchestrator.stages.distill.step_views import StepViews, regenerated_views
from orchestrator.stages.distill.student_backbone import save_network
from orchestrator.stages.distill.student_config import Student
from orchestrator.stages.distill.task import DistillTask
from orchestrator.stages.publish.card import usage
from orchestrator.stages.serving import _load_pyfunc
from orchestrator.teacher_service.payload import VIEWS, block
from orchestrator.training.task import BlockTensors

from .distilling import RECIPE, frozen_teacher, tensors_of
from .small import BASE

OPTIMIZER = {"lr": {"peak": 1e-3}}


class Own(nn.Module):
    """A user's network, with BatchNorm and dropout."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.dropout(F.gelu(self.norm(self.stem(x))), 0.3, self.training))
        return out


class Vector(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def config(student: dict[str, Any] | None = None, **more: Any) -> Distill:
    own = {"module": f"{__name__}:Own"} if student is None else student
    return Distill.model_validate(
        {
            **BASE,
            "kind": "distill",
            "students": {"own": own, "vit": {"model": "vit_femto"}},
            "features": {"teachers": {"a": {"timm": "resnet18"}}},
            **more,
        }
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a student is exactly one of model, module, timm, transformers: it has none of them"),
        ({"model": "vit_femto", "timm": "resnet18"}, "it has model and timm"),
        ({"module": "no colon"}, "should match pattern"),
        ({"model": "vit_femto", "kwargs": {"width": 3}}, "`kwargs` are for module, timm and transformers"),
        ({"module": "a:b", "model_overrides": {"dim": 8}}, "model_overrides is for `model`"),
        (
            {"timm": "resnet18", "drop_path": 0.1},
            "drop_path is for `model`: set what timm has of it in kwargs",
        ),
        ({"timm": "resnet18", "kwargs": {"pretrained": True}}, "pretrained is not a setting"),
        ({"module": "a:b", "mask_inputs": True}, "mask_inputs is for `model`"),
        (
            {"module": "a:b", "optimizer": {**OPTIMIZER, "layer_decay": 0.9}},
            "optimizer.layer_decay is for `model`",
        ),
    ],
)
def test_students_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Student.model_validate(fields)


def test_keys_of_students_that_were_there_before_stay() -> None:
    student = Student.model_validate({"model": "vit_femto"})
    assert not {"module", "timm", "transformers", "kwargs"} & student.identity().keys()
    one, other = (
        Student.model_validate({"module": "a:b", "kwargs": {"width": width}}).identity() for width in (3, 4)
    )
    assert one != other


@pytest.mark.parametrize(
    ("student", "where", "message", "hint"),
    [
        ({"module": "no_such_nets:make"}, "module", "no_such_nets cannot be imported", "PYTHONPATH"),
        (
            {"module": f"{__name__}:Owm"},
            "module",
            "has nothing called 'Owm'",
            f"did you mean {__name__}:Own?",
        ),
        (
            {"module": f"{__name__}:Vector"},
            "module",
            r"it gives float32 \(2, 3\); expected a map",
            "cls and patches",
        ),
        ({"module": f"{__name__}:config"}, "module", "gives Distill, not an nn.Module", "wrap it"),
        (
            {"module": f"{__name__}:Own", "kwargs": {"wide": 3}},
            "module",
            r"Own\(wide=3\) fails: TypeError",
            "wrap it",
        ),
        (
            {"module": f"{__name__}:Own", "views": {"global_size": 60}},
            "module",
            "a map of 7 x 7",
            "crop sizes",
        ),
        ({"module": "edgy"}, "module", "there is no teacher 'edgy'", "import path"),
    ],
)
def test_what_is_told_before_training(student: dict[str, Any], where: str, message: str, hint: str) -> None:
    stage = config(student, features=None)
    with pytest.raises(UserError, match=message) as caught:
        stage.check()
    assert caught.value.where == f"students.own.{where}"
    assert hint in str(caught.value.hint)


def test_a_student_that_can_be_trained_passes() -> None:
    config({"module": f"{__name__}:Own", "kwargs": {"width": 3}}, features=None).check()


def test_a_module_is_part_of_its_own_students_key_alone(tmp_path: Path) -> None:
    (tmp_path / "my_nets.py").write_text("make = 1")
    sys.path.insert(0, str(tmp_path))
    try:
        stage = config({"module": "my_nets:make"})
        assert stage.files() == {"students.own.module": (tmp_path / "my_nets.py",)}
        assert stage.modules() == ("my_nets:make",)
    finally:
        sys.path.remove(str(tmp_path))
    field = "students.own.module"
    assert stage.concerns(field, {"name": "own"})
    assert not stage.concerns(field, {"name": "vit"})
    assert not stage.concerns(field, {}), "nor do teachers depend on it"
    assert stage.concerns("features.teachers.a.module", {"name": "vit"})
    assert stage.student_towers()["own"] is None


# --- learning -------------------------------------------------------------------------------------------------------

SHAPES = {"a": TeacherShape(dim=7, grid=(4, 4))}


def blocks_of(index: Path, stage: Distill) -> list[BlockTensors]:
    """Both blocks of a step, with made-up words of a teacher."""
    parts = StepViews(stage, None, index, 5, {VIEWS: stage.crops}).parts(2)
    made = []
    for number in range(2):
        tensors = {
            name: torch.from_numpy(np.array(a)) for name, a in block(parts[VIEWS], number, 2)[1].items()
        }
        drawn = torch.Generator().manual_seed(number)
        tensors["a.cls"] = torch.randn(2, 4, 7, generator=drawn)
        tensors["a.patches"] = torch.randn(2, 4, 16, 7, generator=drawn)
        made.append(BlockTensors(2, number, 1.0, tensors))
    return made


def gradients(task: FeatureTask, *blocks: BlockTensors) -> dict[str, Tensor]:
    """Of the last of these blocks, after those before it."""
    net = task.modules.trainable
    for each in blocks:
        net.zero_grad()
        task.losses(each, task.targets([each], lambda tensor: tensor)[0]).total.backward()
    return {name: param.grad.clone() for name, param in net.named_parameters() if param.grad is not None}


def feature_task(stage: Distill, **objective: Any) -> FeatureTask:
    wanted = FeatureObjective.model_validate({"teachers": {"a": {"timm": "resnet18"}}, **objective})
    task = FeatureTask(stage, stage.students["own"], wanted, SHAPES, seed=1)
    torch.manual_seed(0)
    task.build("cpu")
    task.modules.trainable.train()
    return task


def test_a_blocks_gradient_follows_from_the_block_alone(index: Path) -> None:
    """So a step is the same on any number of workers: BatchNorm and dropout among its blocks change nothing."""
    stage = config()
    first, second = blocks_of(index, stage)
    task = feature_task(stage, local_weight=0.5)
    torch.manual_seed(3)
    alone = gradients(task, second)
    torch.manual_seed(4)
    after_another = gradients(feature_task(stage, local_weight=0.5), first, second)
    assert {"backbone.net.stem.weight", "backbone.net.norm.bias", "cls_heads.of_a.weight"} <= alone.keys()
    for name, gradient in alone.items():
        assert torch.equal(gradient, after_another[name]), name
        assert gradient.isfinite().all()
        # A bias before BatchNorm has no effect.
        assert gradient.abs().sum() > 0 or name == "backbone.net.stem.bias", name


def test_the_ema_begins_as_the_student(index: Path) -> None:
    task = feature_task(config())
    assert task.modules.ema is not None
    own, average = task.modules.trainable.state_dict(), task.modules.ema.state_dict()
    assert own.keys() == average.keys()
    assert all(torch.equal(value, average[name]) for name, value in own.items())


def test_heads_on_an_own_network(index: Path, teacher: Path) -> None:
    """DINO and iBOT on a map: masks only choose the tokens."""
    stage = config(features=None)
    parts = frozen_teacher(stage, teacher, index)(0)
    task = DistillTask(stage, stage.students["own"], RECIPE, teacher, 5)
    task.build("cpu")
    task.modules.trainable.train()
    tensors = tensors_of(parts, 0, 0)
    (target,) = task.targets([tensors], lambda tensor: tensor)
    losses = task.losses(tensors, target)
    losses.total.backward()
    assert losses.total.isfinite()
    trained = [param for param in task.modules.trainable.parameters() if param.requires_grad]
    assert all(param.grad is not None and param.grad.isfinite().all() for param in trained)


def test_what_is_left_is_the_average_with_measured_statistics(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_backbone, "NORM_IMAGES", 16)
    stage = config()
    task = feature_task(stage)
    ema: Any = task.modules.ema
    with torch.no_grad():
        ema.backbone.net.stem.weight.mul_(3)
    export = {name: param.detach().clone() for name, param in ema.named_parameters()}
    save_file(export, tmp_path / "export.safetensors")
    views = regenerated_views(stage, index, 5, stage.crops)
    save_network(
        stage,
        stage.students["own"],
        1,
        None,
        lambda: views,
        tmp_path / "export.safetensors",
        tmp_path / "out",
    )
    model: Any = orchestrator.load(tmp_path / "out", trust_module=__name__)
    net = model.module.net
    assert torch.equal(net.stem.weight, ema.backbone.net.stem.weight)
    assert model.image_size == 32

    means, variances = [], []
    for step in range(2):  # of 8 images each
        for number in range(2):
            globals_GBCHW = torch.from_numpy(views.load(step, number).arrays["globals"])
            x = F.conv2d(normalise(globals_GBCHW.flatten(0, 1)), net.stem.weight, net.stem.bias, 8)
            means.append(x.mean(dim=(0, 2, 3)))
            variances.append(x.var(dim=(0, 2, 3)))
    torch.testing.assert_close(net.norm.running_mean, torch.stack(means).mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.norm.running_var, torch.stack(variances).mean(0), rtol=1e-3, atol=1e-4)

    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    vector = orchestrator.embed(model, photo)
    assert vector.shape == (5,)
    assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-5)


def test_a_folder_of_an_own_network_is_told_apart(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_backbone, "NORM_IMAGES", 8)
    stage = config()
    export = {
        name: param.detach() for name, param in feature_task(stage).modules.trainable.named_parameters()
    }
    save_file(export, tmp_path / "export.safetensors")
    views = partial(regenerated_views, stage, index, 5, stage.crops)
    save_network(
        stage,
        stage.students["own"],
        1,
        None,
        views,
        tmp_path / "export.safetensors",
        tmp_path / "out",
    )
    with pytest.raises(UserError, match=f"its network is made by {__name__}:Own") as caught:
        orchestrator.load(tmp_path / "out")
    assert "trust_module=" in str(caught.value.hint)
    with pytest.raises(UserError, match="trust_module is 3"):
        orchestrator.load(tmp_path / "out", trust_module=3)  # type: ignore[arg-type]
    model = tmp_path / "out" / "model"
    with pytest.raises(ValueError, match="this is a network from elsewhere"):
        load_pretrained(model)
    with pytest.raises(ValueError, match="its network is made by"):
        _load_pyfunc(str(model))
    text = usage("cnn", json.loads((model / "config.json").read_text()))
    assert f"orchestrator.load(\"cnn\", trust_module='{__name__}')" in text
    assert "load_pretrained" not in text
    assert width(model) == 5
