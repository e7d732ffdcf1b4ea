"""Closed-form parameters and operations against torch's own counts, and against the paper's table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models import (
    PRESETS,
    Config,
    ConvNeXtConfig,
    PrototypeHead,
    ViTConfig,
    count_params,
    from_config,
)
from orchestrator.models.cost import forward_flops, head_flops, head_params, num_params

# GFLOPs at 256 and 512 px as the paper prints them (arXiv 2508.10104), rounded to integers.
_PUBLISHED_VITS = {
    "vit_s": (12, 63),
    "vit_s_plus": (16, 79),
    "vit_b": (47, 216),
    "vit_l": (163, 721),
    "vit_h_plus": (450, 1903),
    "vit_7b": (3550, 14515),
}
_ODD = [
    ViTConfig(patch_size=14, dim=48, depth=2, num_heads=2, num_storage_tokens=0, qkv_bias=False),
    ViTConfig(
        patch_size=4, dim=40, depth=1, num_heads=1, ffn="swiglu", ffn_hidden=56, separate_local_norm=True
    ),
    ConvNeXtConfig((1, 2, 1, 3), (8, 24, 16, 40), stem_stride=2),
]


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(config, id=name, marks=pytest.mark.heavy) for name, config in PRESETS.items()),
        *(pytest.param(config, id=f"odd{number}") for number, config in enumerate(_ODD)),
    ],
)
def test_equals_what_torch_counts(config: Config) -> None:
    with torch.device("meta"):
        model = from_config(config).eval()
    assert num_params(config) == count_params(model)
    for rows, columns in ((2, 3), (16, 16)):
        height, width = rows * config.patch_size, columns * config.patch_size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, height, width, device="meta"))
        assert forward_flops(config, height, width) == counter.get_total_flops()


def test_head_equals_what_torch_counts() -> None:
    with torch.device("meta"):
        head, rows = PrototypeHead(40, 56, 24, 104), torch.empty(7, 40)
    assert head_params(40, 56, 24, 104) == count_params(head)
    for with_logits, prototypes in ((True, 104), (False, 0)):
        with FlopCounterMode(display=False) as counter:
            head(rows, with_logits)
        assert 7 * head_flops(40, 56, 24, prototypes) == counter.get_total_flops()


def test_paper_scale_heads() -> None:
    assert head_params(4096, 8192, 512, 262_144) == 239_092_224  # by hand, with biases
    assert head_flops(4096, 8192, 512, 262_144) == 2 * 239_075_328


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"250 x 256 px is not a multiple of the patch, 16 px"):
        forward_flops(PRESETS["vit_s"], 250, 256)


@pytest.mark.parametrize("name", _PUBLISHED_VITS)
def test_transformers_cost_what_the_paper_prints(name: str) -> None:
    for size, printed in zip((256, 512), _PUBLISHED_VITS[name], strict=True):
        gflops = forward_flops(PRESETS[name], size, size) / 1e9
        assert (printed - 0.5) * 0.97 <= gflops <= (printed + 0.5) * 1.03


@pytest.mark.parametrize(("name", "printed"), [("convnext_s", 11), ("convnext_b", 20)])
def test_the_paper_counts_multiply_adds_of_convnexts(name: str, printed: int) -> None:
    # T (5.8, printed 5) and L (44.9, printed 38) fit no way of counting: docs/models.md.
    multiply_adds = forward_flops(PRESETS[name], 256, 256) / 2e9
    assert (printed - 0.5) * 0.97 <= multiply_adds <= (printed + 0.5) * 1.03


def test_the_command_lists_every_preset_and_needs_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['orchestrator', 'models', '--json']\n"
        "from orchestrator.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'ray', 'mlflow', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(set(row) == {"name", "params", "gflops_256", "gflops_512"} for row in rows)
    (vit_b,) = [row for row in rows if row["name"] == "vit_b"]
    assert vit_b["params"] == 85_660_416
    assert vit_b["gflops_512"] == pytest.approx(215.04, abs=0.01)


def test_the_command_prints_a_table() -> None:
    command = [sys.executable, "-m", "orchestrator", "models"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in PRESETS)
    assert "6,716,043,264" in said
    assert "counts as 2 operations" in said
