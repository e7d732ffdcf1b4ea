"""What `bench/headless` measures with: the teacher's network, its scores, and the table they end in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import headless  # noqa: E402
from bench.headless import score, train  # noqa: E402
from orchestrator.models import count_params, efficientnet  # noqa: E402
from orchestrator.models.wrapped import ForeignNet, open_module  # noqa: E402
from orchestrator.storage.cache_folder import cache_folder  # noqa: E402
from orchestrator.teacher_service import payload  # noqa: E402


def randomise(net: torch.nn.Module) -> None:
    """Weights and running statistics that every part of the output depends on."""
    random = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            noise = torch.randn(tensor.shape, generator=random) * (2 / fan) ** 0.5
            tensor.copy_(
                1 + 0.1 * noise.abs() if name.endswith(("var", "bn0.weight", "bn1.weight")) else noise
            )


# --- the teacher ------------------------------------------------------------------------------------------------


def test_lite0_has_the_published_size_and_map() -> None:
    net = efficientnet.lite0().eval()
    assert count_params(net) == 4_652_008
    teacher = ForeignNet(net, 224)
    assert (teacher.dim, teacher.grid) == (1280, (7, 7))
    assert ForeignNet(net, 100).grid == (4, 4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1)]
)
def test_what_padding_lacks_is_added_at_the_end(size: int, kernel: int, stride: int) -> None:
    """Against the definition: output cell i starts at stride · i − ⌊total padding / 2⌋."""
    conv = efficientnet.SameConv(1, 1, kernel, stride)
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(1))
    got = conv(image)[0, 0]
    cells = -(-size // stride)
    assert got.shape == (cells, cells)
    before = max(0, (cells - 1) * stride + kernel - size) // 2
    around = F.pad(image, [kernel] * 4)[0, 0]
    for row in range(cells):
        for column in range(cells):
            top, left = (kernel + stride * place - before for place in (row, column))
            window = around[top : top + kernel, left : left + kernel]
            torch.testing.assert_close(
                got[row, column], (window * conv.weight[0, 0]).sum(), rtol=1e-4, atol=1e-5
            )


def test_lite0_gives_the_features_of_the_reference() -> None:
    library = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = library.EfficientNet.from_name("efficientnet-lite0").eval()
    randomise(theirs)
    ours = efficientnet.lite0().eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs.extract_features(images)
        assert wanted.std() > 0.01, "or dead features would agree"
        torch.testing.assert_close(ours(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_real_weights_score_what_they_are_known_to_score() -> None:
    """The known figure is 0.687; sizes and cuts of the pictures differ."""
    weights = cache_folder() / "lite0" / "efficientnet-lite0.pth"
    if not weights.is_file():
        pytest.skip(f"python -m orchestrator.data.weights lite0 {weights.parent}")
    asked = score.exam("food")
    assert len(asked.labels) == 406
    found = asked.score(score.of_teacher(weights, score.OWN_SIZE))["leave one out"]
    assert found == pytest.approx(0.687, abs=0.04)


# --- scores -----------------------------------------------------------------------------------------------------


def test_scores_tell_what_can_be_told() -> None:
    images = np.zeros((40, 3, 16, 16), np.uint8)
    images[::2, 0] = 200
    images[1::2, 1] = 200
    asked = score.Exam(images, ["red", "green"] * 20, np.arange(40) < 10)
    assert asked.score(score.of_pixels) == {"leave one out": 1.0, "held out": 1.0}
    mixed = score.Exam(images, ["red", "red", "green", "green"] * 10, np.arange(40) < 10)
    assert mixed.score(score.of_pixels)["leave one out"] < 0.8


def test_only_training_pictures_vote_on_held_out_ones() -> None:
    """Four twins in the held-out part would outvote the bank if they took part."""
    images = np.zeros((12, 3, 8, 8), np.uint8)
    images[:, 0] = 10 + np.arange(12)[:, None, None]
    images[6:, 1] = 90
    labels = ["low"] * 6 + ["wrong"] * 6
    held = np.array([False] * 6 + [True] * 6)
    assert score.Exam(images, labels, held).score(score.of_pixels)["held out"] == 0.0


def test_a_tower_sees_pictures_of_its_size_in_full_range() -> None:
    seen: list[Tensor] = []

    class Tower(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.new_zeros(len(x), 1), x.new_zeros(len(x), 1, 1)  # type: ignore[return-value]

    class Named(torch.nn.Module):
        def forward(self, x: Tensor) -> object:
            cls, patches = Tower()(x)
            return type("Said", (), {"cls": cls, "patches": patches})

    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    score.of_student(Named(), 4)(images)  # type: ignore[arg-type]
    assert seen[0].shape == (2, 3, 4, 4)
    assert seen[0][0, 0, 0, 0] == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)


# --- training and the table ----------------------------------------------------------------------------------------


def test_the_plans_are_stages_that_can_be() -> None:
    config = train.distill_config(train.FULL)
    assert len(config.students) == len(train.MODELS) * train.FULL.seeds
    assert {config.crops_of(student).global_size for student in config.students.values()} == {train.SIZE}
    assert config.crops.global_size == train.TEACHER_SIZE
    for model in train.MODELS.values():
        assert train.alone_config(model, train.QUICK).steps == train.QUICK.alone_steps
    assert train.objective(Path("w.pth")).teachers[train.TEACHER].weight == 1


def test_a_student_cannot_write_into_what_others_read() -> None:
    said = {"lite0.cls": np.ones((1, 4, 2)), "ids": np.arange(4)}
    words = [{payload.TEACHER: said, train._PART: {"globals": np.ones((1, 4, 3))}}]
    block = train.Kept(words).load(0, 0)
    assert block.ids.tolist() == [0, 1, 2, 3]
    for name in ("lite0.cls", "globals"):
        block.arrays[name][:] = 7
    assert said["lite0.cls"].max() == 1


def test_the_document_gets_a_row_a_tower_and_a_column_a_question(tmp_path: Path) -> None:
    arms = headless._arms(
        {
            name: {"raw pixels": {"leave one out": [raw], "held out": [0.3]}}
            for name, raw in zip(score.SETS, (0.4, 0.5), strict=True)
        },
        {
            name: {
                f"{kind}, {way}": {"leave one out": [value, value + 0.1], "held out": [value, value]}
                for kind in train.MODELS
                for way, value in (("distilled", 0.6), ("from scratch", 0.35))
            }
            for name in score.SETS
        },
    )
    finding = headless._finding(arms, train.QUICK)
    assert len(finding.questions) == 8
    assert all(question.holds for question in finding.questions)
    results = tmp_path / "results.json"
    record = {"date": "2026-01-02", "machine": "x, 2 cores", "wall_s": 60, **finding.as_json()}
    results.write_text(json.dumps({"headless": record}))
    document = tmp_path / "headless.md"
    document.write_text("before\n<!-- measured -->\nof yesterday\n<!-- end of measured -->\nafter\n")
    headless.write_document(results, document)
    text = document.read_text()
    assert "| | food, leave one out | food, held out | stamps, leave one out | stamps, held out |" in text
    assert "| raw pixels | 0.400 | 0.300 | 0.500 | 0.300 |" in text
    assert "| ViT, distilled | 0.650 ± 0.071 | 0.600 ± 0.000 |" in text
    assert "of yesterday" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")


def test_the_teacher_is_reached_by_its_module_path(tmp_path: Path) -> None:
    torch.save(efficientnet.lite0().state_dict(), tmp_path / "lite0.pth")
    train.objective(tmp_path / "lite0.pth").check(train.distill_config(train.QUICK).crops)
    assert open_module("orchestrator.models.efficientnet:lite0", tmp_path / "lite0.pth", 64).grid == (2, 2)
