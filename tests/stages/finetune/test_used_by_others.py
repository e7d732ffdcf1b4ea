"""Fine-tuned models are evaluated and published like any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import orchestrator
from orchestrator.models import (
    efficientnet,
    normalise,
)
from orchestrator.stages.base import ImageCount, PlanContext
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.finetune.export import save_finetuned
from orchestrator.stages.finetune.start import StartingBackbone, starting_backbone
from orchestrator.stages.finetune.task import FinetuneTask
from orchestrator.stages.publish.config import Publish
from orchestrator.tracking import download
from orchestrator.tracking.run import Tracking

from ..registries import artifact
from ..registries import context as registry_context
from .finetuning import LABELS, config, context, exported


def test_it_is_evaluated_on_photos_whose_labels_it_did_not_learn() -> None:
    split = {"by": "hash", "seed": 3}
    tuned = config(split=split, network={"transformers": "x"})

    def said(**more: Any) -> list[str]:
        stage = Evaluate.model_validate({"kind": "evaluate", **more})
        around = PlanContext({"finetuned": tuned}, photos=ImageCount(9, 0, 9), names={"finetuned": "groups"})
        return [f"{error.where}: {error.what}" for error in stage.preflight(around)]

    assert said(split=split) == []
    for other in ({}, {"split": {"by": "hash"}}):
        assert said(**other) == [
            "split: groups learned the labels of its training photos, and the split here is another one"
        ]
    assert Evaluate(kind="evaluate").scored("finetune") == ("knn",)


@pytest.mark.heavy
def test_it_is_evaluated_and_published_like_any_model(
    index: Path, start: StartingBackbone, tmp_path: Path, empty_database: Path
) -> None:
    stage = config(mode="lora", split={"near_duplicate": 1.0})
    file = exported(stage, start, tmp_path / "e.safetensors")
    save_finetuned(stage, start, LABELS, file, tmp_path / "tuned/model")
    (tmp_path / "tuned/history.json").write_text("[]")
    evaluate = Evaluate.model_validate({"kind": "evaluate", "split": {"near_duplicate": 1.0}})
    around = context(index, tmp_path, finetuned=tmp_path / "tuned")
    around.out.mkdir()
    evaluate.run(around)
    table = json.loads((around.out / "table.json").read_text())
    names = [row["name"] for row in table["knn"]["rows"]]
    assert names == ["majority group", "raw pixels", "random vit_femto", "finetune"]

    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = artifact("finetune", "e" * 64, tmp_path / "tuned", {"index": "c" * 64})
    (tmp_path / "publish/out").mkdir(parents=True)
    with Tracking(uri, "tuned", tmp_path / "spool") as tracking:
        now = registry_context(
            tmp_path / "publish",
            "food",
            tracking.run("publish"),
            {"models.groups": made},
            {"models.groups": stage},
        )
        assert Publish(kind="publish").run(now) == {"published": 1.0}
    pulled = download.pull("food-groups@champion", tmp_path / "pulled", uri)
    model = orchestrator.load(pulled)
    assert model.classes == LABELS
    assert model.predict(np.zeros((20, 20, 3), np.uint8)).labels[0] in LABELS


@pytest.mark.heavy
def test_a_network_with_batch_norm_and_a_mean_of_its_own_is_tuned_as_it_came(
    index: Path, tmp_path: Path
) -> None:
    """EfficientNet-Lite0: its statistics stay, and its mean and deviation travel with the model."""
    torch.manual_seed(3)
    net = efficientnet.lite0().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    stage = config(
        network={
            "module": "orchestrator.models.efficientnet:lite0", "weights": str(tmp_path / "lite0.pth"),
            "mean": efficientnet.MEAN, "std": efficientnet.STD,
        },
        mode="full", image_size=64,
    )  # fmt: skip
    assert stage.modules() == ("orchestrator.models.efficientnet:lite0",)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    x = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - efficientnet.MEAN[0]) / efficientnet.STD[0]
    around = replace(context(index, tmp_path), modules=stage.modules())
    with starting_backbone(stage, around) as start:
        task = FinetuneTask(stage, start, LABELS, 0)
        net_in_training = task.build("cpu").trainable.train()
        assert not any(
            part.training for part in net_in_training.modules() if isinstance(part, nn.BatchNorm2d)
        )
        images = torch.from_numpy(picture).permute(2, 0, 1)[None]
        with torch.no_grad():
            wanted = net(x).flatten(2).mean(dim=2)
            seen = net_in_training.backbone(normalise(images, net_in_training.backbone)).cls
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)
        trained = {name for name, param in net_in_training.named_parameters() if param.requires_grad}
        assert "backbone.net._conv_stem.weight" in trained
        assert not any("_fc" in name for name in trained), "the features do not depend on its classifier"
        file = exported(stage, start, tmp_path / "e.safetensors")
        save_finetuned(stage, start, LABELS, file, tmp_path / "model")
    model = orchestrator.load(tmp_path / "model", trust_module="orchestrator")
    state = model.module.state_dict()
    torch.testing.assert_close(state["net._bn0.running_mean"], net._bn0.running_mean)
    record = json.loads((tmp_path / "model/config.json").read_text())
    assert record["mean"] == pytest.approx(efficientnet.MEAN)
    assert model.predict(picture).probabilities.sum() == pytest.approx(1.0)
