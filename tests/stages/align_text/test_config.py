"""What `align_text` takes, what it refuses, and the tower that it finds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.pipeline.load import load
from orchestrator.stages.align_text.config import AlignText, pick_image_size, pick_tower
from orchestrator.stages.align_text.task import align_net

from .aligning import (
    config,
    words_tokenizer,
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"block_size": 5}, "not a multiple of block_size 5"),
        ({"text": {"dim": 10, "num_heads": 3}}, "not a multiple of num_heads 3"),
        ({"vocab_size": 100}, "greater than or equal to 259"),
        ({"optimizer": {"layer_decay": 0.9}}, "layer_decay"),
        ({"temprature": 0.1}, "Extra inputs"),
        ({"text": {"lock": True}}, "set `from`"),
        ({"text": {"from": "x", "dim": 64, "depth": 2}, "vocab_size": None}, "leave out depth, dim"),
        ({"text": {"from": "x"}}, "leave out vocab_size"),
        ({"tokenizer": "x"}, "leave out vocab_size"),
        ({"text": {"from": "x"}, "tokenizer": "y", "vocab_size": None}, "leave out tokenizer"),
        ({"start_token": "<s>", "tokenizer": "x", "vocab_size": None}, "set end_token too"),
        ({"end_token": "</s>"}, "are for a given tokenizer"),
        ({"pool": "patches"}, "cls_and_patches"),
        ({"projection": "shared", "output_dim": 13}, "output_dim 13 is odd"),
        ({"text": {"from": "x", "init": "by_width"}, "vocab_size": None}, "leave out init"),
    ],
)
def test_config_that_cannot_work_is_refused(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**overrides)


def test_the_defaults_are_the_recipe_s() -> None:
    """dino.txt as DINOv3 uses it; only what has to be small for a laptop is not its."""
    stage = AlignText(kind="align_text", steps=50_000, batch_size=65_536)
    rate = stage.optimizer.lr
    assert (rate.peak, rate.warmup_steps, rate.shape, rate.end) == (7e-4, 2000, "cosine", 0.0)
    assert (stage.optimizer.weight_decay.peak, stage.optimizer.layer_decay) == (1e-4, 1.0)
    assert (stage.num_blocks, stage.drop_path, stage.pool, stage.context) == (2, 0.3, "cls_and_patches", 77)
    assert (stage.temperature, stage.max_scale) == (0.07, 100.0)
    with torch.device("meta"):
        large = config(text={"dim": 1280, "depth": 24, "num_heads": 20}, output_dim=2048, context=77)
        net = align_net(large, 1024, 49_408, None)
    aligner, text = net.aligner, net.text
    assert [block.ffn.gate.out_features for block in aligner.blocks] == [2736, 2736]
    assert aligner.proj.weight.shape == (2048, 2 * 1024)
    assert (len(text.blocks), text.positions.shape, text.proj.weight.shape) == (24, (77, 1280), (2048, 1280))
    assert all(block.attention.causal and block.attention.num_heads == 20 for block in text.blocks)
    assert not any(block.attention.causal for block in aligner.blocks)


def test_recipe_values_stay_when_only_the_rate_is_given() -> None:
    optimizer = config(optimizer={"lr": {"peak": 1e-3}}).optimizer
    assert (optimizer.weight_decay.peak, optimizer.layer_decay) == (1e-4, 1.0)


def pipeline_file(folder: Path, **align: Any) -> Path:
    stages = {
        "curate": {"kind": "curate", "data": "photos"},
        "pretrain": {
            "kind": "pretrain", "needs": "curate", "model": "vit_femto", "steps": 1, "batch_size": 16,
            "optimizer": {"lr": {"peak": 1.0e-3}},
        },
        "align": {
            "kind": "align_text", "needs": ["curate", "pretrain"], "steps": 1, "batch_size": 16, **align,
        },
    }  # fmt: skip
    (folder / "photos").mkdir(exist_ok=True)
    document = {"name": "small", "data": {"photos": {"path": str(folder / "photos")}}, "stages": stages}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "pipeline.yaml"


def test_given_files_are_checked_before_anything_runs(tmp_path: Path, encoder: Path) -> None:
    loaded = load(pipeline_file(tmp_path, text={"from": str(encoder), "lock": True}, context=20))
    assert f"from: {encoder}" in loaded.resolved()
    words = str(words_tokenizer(tmp_path / "words.json"))
    for fields, message in (
        ({"tokenizer": f"{words}x"}, r"no such file: .*words\.jsonx[^\0]*stages\.align\.tokenizer"),
        ({"tokenizer": words}, r"does not end a text[^\0]*:\d+  stages\.align\.tokenizer"),
        ({"text": {"from": str(tmp_path)}}, r"no such file: .*config\.json[^\0]*stages\.align\.text\.from"),
        ({"text": {"from": str(encoder)}, "context": 21}, r"21 tokens[^\0]*stages\.align\.context"),
        ({"text": {"form": "x"}}, r"form[^\0]*'from'"),
    ):
        with pytest.raises(UserError) as caught:
            load(pipeline_file(tmp_path, **fields))
        assert re.search(message, str(caught.value)), str(caught.value)


def folder_with(tmp_path: Path, *students: str) -> Path:
    for name in students:
        (tmp_path / "students" / name).mkdir(parents=True)
    return tmp_path


def test_the_tower_is_found(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert pick_tower(plain, None) == plain / "model"
    one = folder_with(tmp_path / "one", "vit-nano")
    assert pick_tower(one, None) == pick_tower(one, "vit-nano") == one / "students" / "vit-nano" / "model"


@pytest.mark.parametrize(
    ("students", "wanted", "what", "hint"),
    [
        ((), "nano", "was not distilled", "leave out `student`"),
        (("vit-nano", "convnext"), "vit-nan", "no student 'vit-nan'", "use student: vit-nano"),
        (("vit-nano", "convnext"), "zzz", "no student 'zzz'", "use one of convnext, vit-nano"),
        (("vit-nano", "convnext"), None, "there is more than one", "use one of convnext, vit-nano"),
    ],
)
def test_a_wrong_student_is_refused(
    students: tuple[str, ...], wanted: str | None, what: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=what) as caught:
        pick_tower(folder_with(tmp_path, *students), wanted)
    assert hint in str(caught.value.hint)


def test_image_size_comes_from_the_tower_and_fits_its_patch(tower: Path, tmp_path: Path) -> None:
    assert pick_image_size(tower, None) == 16
    assert pick_image_size(tower, 32) == 32
    with pytest.raises(UserError, match="20 is not a multiple of the tower's patch size 8"):
        pick_image_size(tower, 20)
    save_pretrained(tmp_path / "conv", build("convnext_mini").state_dict(), "convnext_mini")
    assert pick_image_size(tmp_path / "conv", 32) == 32
    with pytest.raises(UserError, match="patch size 16"):
        pick_image_size(tmp_path / "conv", 40)
    with pytest.raises(UserError, match="does not say"):
        pick_image_size(tmp_path / "conv", None)
