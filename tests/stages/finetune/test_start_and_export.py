"""What fine-tuning starts from, what is wrong with it, and the model that it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

import orchestrator
from orchestrator.errors import UserError
from orchestrator.models import (
    build,
    load_pretrained,
    normalise,
    preprocess,
    save_pretrained,
)
from orchestrator.models.predictors import head_of
from orchestrator.pipeline.dag import graph_errors
from orchestrator.pipeline.load import load
from orchestrator.stages.common.mlmodel import mlmodel, width
from orchestrator.stages.common.predictor import Predictor
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.finetune.export import save_finetuned
from orchestrator.stages.finetune.run import best_step
from orchestrator.stages.finetune.start import StartingBackbone, starting_backbone
from orchestrator.stages.finetune.task import FinetuneTask

from .finetuning import LABELS, ROOT, config, context, exported, tiny_dinov2


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_model_of_a_folder_is_the_trained_one(mode: str, start: StartingBackbone, tmp_path: Path) -> None:
    stage = config(mode=mode)
    file = exported(stage, start, tmp_path / "export.safetensors")
    sizes = save_finetuned(stage, start, LABELS, file, tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    task = FinetuneTask(stage, start, LABELS, 0)
    net = task.build("cpu").trainable
    state = load_file(file)
    net.load_state_dict(state, strict=False)
    net.eval()
    backbone = task.modules.frozen.get("backbone", net.backbone)
    assert backbone is not None
    with torch.no_grad():
        features = backbone.eval()(preprocess(picture, 16))
        logits = net.head(features)

    model = orchestrator.load(tmp_path / "model")
    assert model.image_size == 16
    assert model.classes == LABELS
    seen = model.features(picture)
    np.testing.assert_allclose(seen.cls, features.cls.numpy(), rtol=1e-4, atol=1e-5)
    found = model.predict(picture)
    np.testing.assert_allclose(found.probabilities, logits.softmax(dim=-1).numpy(), rtol=1e-3, atol=1e-5)
    assert found.labels == [LABELS[int(logits.argmax())]]
    assert found.classes == LABELS
    assert sizes["trained_parameters"] == sum(value.numel() for value in state.values())
    unchanged = load_pretrained(start.folder).state_dict()
    same = {name for name, value in load_pretrained(tmp_path / "model").state_dict().items()
            if torch.equal(value, unchanged[name])}  # fmt: skip
    if mode == "frozen":
        assert same == set(unchanged)
    elif mode == "lora":
        assert set(unchanged) - same == {
            f"blocks.{b}.attention.{n}.weight" for b in (0, 1) for n in ("qkv", "proj")
        }
    else:
        assert same == {"mask_token"}
    # What MLflow serves, and what says how wide its vectors are.
    assert width(tmp_path / "model") == 48
    assert "image" in mlmodel(tmp_path / "model")
    assert orchestrator.embed(model, [picture]).shape == (1, 48)


def test_vectors_that_were_trained_beside_adapters_are_in_the_model(
    start: StartingBackbone, tmp_path: Path
) -> None:
    stage = config(mode="lora", lora={"rank": 2, "vectors": True})
    file = exported(stage, start, tmp_path / "export.safetensors")
    save_finetuned(stage, start, LABELS, file, tmp_path / "model")
    trained = load_file(file)
    found, before = (
        load_pretrained(tmp_path / "model").state_dict(),
        load_pretrained(start.folder).state_dict(),
    )
    assert found.keys() == before.keys()
    for name, value in found.items():
        if name.endswith(("qkv.weight", "proj.weight")) and ".attention." in name:
            assert not torch.equal(value, before[name]), name
        elif value.ndim == 1 and not name.startswith("local_norm."):
            inside = name.replace(".qkv.", ".qkv.base.").replace(".proj.", ".proj.base.")
            key = f"backbone.{inside}" if f"backbone.{inside}" in trained else f"backbone.{name}"
            torch.testing.assert_close(value, trained[key], rtol=0, atol=0)
        else:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_model_without_a_head_says_so(start: StartingBackbone) -> None:
    with pytest.raises(UserError, match="has no classes"):
        orchestrator.load(start.folder).predict([np.zeros((16, 16, 3), np.uint8)])


@pytest.mark.parametrize("least", ["0.5", float("nan"), -0.1, 1.5, True, None])
def test_a_score_that_is_none_is_a_mistake(least: Any, start: StartingBackbone) -> None:
    """With nan nothing would be found, and nobody told why."""
    described = {"type": "detection", "num_queries": 3, "width": 16, "num_layers": 1}
    predictor = Predictor(head_of(described, 48, 2).eval(), "detection", ("cat", "dog"))
    model = replace(orchestrator.load(start.folder), predictor=predictor)
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=r"least is .*"):
        model.predict_boxes(picture, least=least)
    assert len(model.predict_boxes(picture, least=0)[0].labels) == 3


def test_a_head_that_does_not_fit_is_a_mistake_and_no_traceback(
    start: StartingBackbone, tmp_path: Path
) -> None:
    stage = config()
    save_finetuned(
        stage, start, LABELS, exported(stage, start, tmp_path / "e.safetensors"), tmp_path / "model"
    )
    record = json.loads((tmp_path / "model/config.json").read_text())
    record["extra"]["head"]["classes"].append("elk")
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"head\.safetensors does not fit its description"):
        orchestrator.load(tmp_path / "model")
    record["extra"]["head"]["type"] = "clairvoyance"
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="knows no head of type 'clairvoyance'"):
        orchestrator.load(tmp_path / "model")
    record["extra"]["head"] |= {"type": "classification", "classes": "cde"}
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="`classes` of the head is 'cde'; it must be a list"):
        orchestrator.load(tmp_path / "model")


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_network_of_transformers_is_tuned_and_loads_again(mode: str, index: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = Dinov2Model(tiny_dinov2()).eval()
    net.save_pretrained(tmp_path / "dinov2")
    stage = config(network={"transformers": str(tmp_path / "dinov2")}, image_size=16, mode=mode)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    around = context(index, tmp_path)
    with starting_backbone(stage, around) as begun:
        with torch.no_grad():
            wanted = net(normalise(torch.from_numpy(picture).permute(2, 0, 1)[None])).last_hidden_state
            opened = begun.open()(normalise(torch.from_numpy(picture).permute(2, 0, 1)[None]))
        torch.testing.assert_close(opened.cls, wanted[:, 0])
        file = exported(stage, begun, tmp_path / "e.safetensors")
        save_finetuned(stage, begun, LABELS, file, tmp_path / "model")
        # Once it is written down, the files that it came from are not asked again.
        with starting_backbone(stage, around) as again:
            assert again.folder == begun.folder
    model = orchestrator.load(tmp_path / "model")
    assert model.predict(picture).probabilities.sum() == pytest.approx(1.0)
    same = np.allclose(model.features(picture).cls, wanted[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    assert same == (mode == "frozen")


@pytest.mark.parametrize("library", ["ours", "transformers"])
def test_adapters_and_vectors_are_merged_into_what_was_trained(
    library: str, start: StartingBackbone, index: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    Dinov2Model(tiny_dinov2()).save_pretrained(tmp_path / "dinov2")
    lora = {"rank": 2, "targets": ["attention", "mlp"], "vectors": True}
    source = (
        {"from": str(start.folder)} if library == "ours" else {"network": {library: str(tmp_path / "dinov2")}}
    )
    stage = config(image_size=16, mode="lora", lora=lora, **source)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with starting_backbone(stage, context(index, tmp_path)) as begun:
        file = exported(stage, begun, tmp_path / "e.safetensors")
        save_finetuned(stage, begun, LABELS, file, tmp_path / "model")
        net = FinetuneTask(stage, begun, LABELS, 0).build("cpu").trainable.eval()
    net.load_state_dict(load_file(file), strict=False)
    assert {".lora_up" in name for name in load_file(file)} == {True, False}
    with torch.no_grad():
        wanted = net.backbone(normalise(torch.from_numpy(picture).permute(2, 0, 1)[None]))
    found = orchestrator.load(tmp_path / "model").features(picture)
    np.testing.assert_allclose(found.cls, wanted.cls.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.patches, wanted.patches.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "said", "where"),
    [
        ({"targets": ["q_proj"]}, "no linear layer matches the target 'q_proj'", "targets"),
        ({"rank": 50}, "rank 50 is more than the smaller side", "rank"),
    ],
)
def test_adapters_that_do_not_fit_are_told_before_the_first_step(
    lora: dict[str, Any], said: str, where: str, index: Path, start: StartingBackbone, tmp_path: Path
) -> None:
    stage = config(mode="lora", lora=lora, **{"from": str(start.folder)})
    with pytest.raises(UserError, match=said) as caught, starting_backbone(stage, context(index, tmp_path)):
        pass
    assert caught.value.where == f"stages.tune.lora.{where}"


def test_a_size_that_the_backbone_cannot_take_is_told_before_the_first_step(
    index: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "a/model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    with (
        pytest.raises(UserError, match="image_size 20 is not a multiple of the backbone's patch size 8"),
        starting_backbone(config(image_size=20), context(index, tmp_path, backbone=tmp_path / "a")),
    ):
        pass


@pytest.mark.parametrize("extra", [{"image_size": size} for size in ("abc", 10**9, -8, True, [16], 16.5, 0)])
def test_a_size_that_weights_from_anywhere_say_is_one_or_a_mistake(
    extra: dict[str, Any], start: StartingBackbone, index: Path, tmp_path: Path
) -> None:
    record = json.loads((start.folder / "config.json").read_text())
    (start.folder / "config.json").write_text(json.dumps(record | {"extra": extra}))
    stage = Finetune.model_validate({**config().model_dump(exclude_unset=True), "from": str(start.folder)})
    told = pytest.raises(UserError, match=r"image_size in the config\.json of .* is ")
    with told as caught, starting_backbone(stage, context(index, tmp_path)):
        pass
    assert caught.value.where == "stages.tune.from"


def test_the_best_step_is_the_first_of_the_best() -> None:
    stage = config(steps=5, validate_every=2)
    assert stage.validation_steps() == (2, 4, 5)
    looks: list[dict[str, Any]] = [
        {"step": step, "metrics": {"accuracy": value}} for step, value in ((2, 0.4), (4, 0.6), (5, 0.6))
    ]
    assert best_step(stage, looks) == 4
    assert best_step(stage, []) == 5
    looks[0]["metrics"]["accuracy"] = float("nan")
    assert best_step(stage, looks) == 4, "what is not a number is not the best"


@pytest.mark.parametrize("task", ["segmentation", "depth", "detection"])
def test_the_other_examples_are_whole_pipelines(task: str) -> None:
    loaded = load(ROOT / f"conf/examples/finetune_{task}.yaml", needs_data=False)
    stages = [stage for stage in loaded.spec.stages.values() if isinstance(stage, Finetune)]
    assert {stage.task.type for stage in stages} == {task}
    assert not graph_errors(loaded)


def test_the_example_is_a_whole_pipeline() -> None:
    loaded = load(ROOT / "conf/examples/finetune_classification.yaml", needs_data=False)
    stage = loaded.spec.stages["groups"]
    assert isinstance(stage, Finetune)
    assert stage.mode == "lora"
    assert stage.models() == {"": "model"}
    assert loaded.spec.stages["publish"].needs == ("groups",)
    assert not graph_errors(loaded)
