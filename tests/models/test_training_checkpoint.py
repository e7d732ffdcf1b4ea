"""Backbones out of what training runs save, and what cannot be one."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.models import PRESETS, ConvNeXtConfig, ViTConfig, build, preset
from orchestrator.models.convert import (
    PositionsError,
    config_of,
    from_layout,
    from_timm,
    from_transformers,
    load_any,
    save_as,
    to_layout,
)
from orchestrator.models.convert.training_checkpoint import backbone_of
from orchestrator.models.presets import described

State = dict[str, Tensor]


@pytest.fixture
def hub() -> State:
    torch.manual_seed(2)
    tower = build("vit_femto")
    return to_layout(tower.state_dict(), tower.config, "hub")


def headed(state: State, prefix: str = "") -> State:
    """A network with heads around a backbone."""
    heads = {"dino_head.mlp.0.weight": torch.ones(2), "ibot_head.last_layer.weight": torch.ones(3)}
    inside = {f"backbone.{name}": tensor for name, tensor in state.items()} | heads
    return {f"{prefix}{name}": tensor for name, tensor in inside.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "teacher": lambda state: {
        "teacher": headed(state), "student": {name: -value for name, value in headed(state).items()}, "epoch": 3,
    },
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "state_dict": lambda state: {"state_dict": headed(state, "module."), "iteration": 7},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "nested": lambda state: {"model": {"teacher": headed(state, "module."), "step": 1}},
    "flat": lambda state: {
        **headed(state, "teacher."), **{f"student.{name}": -value for name, value in state.items()},
    },
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_the_backbone_is_taken_out_of_what_is_around_it(hub: State, how: str, tmp_path: Path) -> None:
    torch.save(WRAPPED[how](hub), tmp_path / "checkpoint.pth")
    assert config_of(tmp_path / "checkpoint.pth") == PRESETS["vit_femto"]
    tower = load_any(tmp_path / "checkpoint.pth")
    for name, value in from_layout(hub)[1].items():
        assert torch.equal(tower.state_dict()[name], value), name


def test_a_snapshot_of_ours_is_read_without_its_heads(tmp_path: Path) -> None:
    tower = build("vit_femto")
    save_file(headed(dict(tower.state_dict())), tmp_path / "step-00000001.safetensors")
    found = load_any(tmp_path / "step-00000001.safetensors")
    assert all(torch.equal(found.state_dict()[name], value) for name, value in tower.state_dict().items())


@pytest.mark.parametrize("found", [{}, {"epoch": 3, "optimizer": {"lr": 0.1}}, {"model": {"lr": 0.1}}])
def test_what_holds_no_weights_says_what_it_holds(found: Any, tmp_path: Path) -> None:
    torch.save(found, tmp_path / "checkpoint.pth")
    holds = next(iter(found.get("model", found)), "nothing")
    with pytest.raises(ValueError, match=rf"it holds {holds}.*one of teacher, state_dict, model, student"):
        load_any(tmp_path / "checkpoint.pth")


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code in a file was run",))


def test_no_code_in_a_checkpoint_is_run(
    hub: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"teacher": hub, "args": Code()}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_any(tmp_path / "checkpoint.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["pos_embed", "embeddings.position_embeddings"])
def test_learned_positions_are_refused_and_named(hub: State, name: str) -> None:
    with pytest.raises(PositionsError, match=rf"{name} \(1, 17, 48\) is a learned position embedding"):
        from_layout({**hub, name: torch.zeros(1, 17, 48)})


def test_a_name_with_a_prefix_is_not_lost() -> None:
    state = {"module.module.backbone.norm.weight": torch.ones(1), "module.head": torch.ones(1)}
    assert list(backbone_of(state)) == ["norm.weight"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (preset("vit_b"), ("vit_b", {})),
        (preset("vit_b", drop_path=0.3, patch_size=14), ("vit_b", {"patch_size": 14})),
        (preset("convnext_mini"), ("convnext_mini", {})),
        (dataclasses.replace(ConvNeXtConfig(), stem_stride=2), ("convnext_t", {"stem_stride": 2})),
        (ViTConfig(dim=48, depth=1, num_heads=2, patch_size=8, layer_scale_init=0.1), ("vit_femto", {"depth": 1})),
    ],
)  # fmt: skip
def test_a_shape_is_said_by_the_nearest_preset(config: Any, said: tuple[str, dict[str, Any]]) -> None:
    assert described(config) == said
    name, overrides = said
    assert preset(name, **overrides) == dataclasses.replace(config, drop_path=0.0)


# --- by name ----------------------------------------------------------------------------------------------------


def test_a_model_of_timm_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shape that no preset has: the number of heads is asked of timm."""
    tower = build("vit_femto", depth=3)
    state = to_layout(tower.state_dict(), tower.config, "timm")
    asked = {}

    def create_model(name: str, **options: Any) -> Any:
        asked[name] = options
        attention = SimpleNamespace(num_heads=2)
        return SimpleNamespace(state_dict=lambda: state, blocks=[SimpleNamespace(attn=attention)])

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    found = from_timm("vit_small_patch16_dinov3")
    assert asked == {"vit_small_patch16_dinov3": {"pretrained": True, "num_classes": 0}}
    assert found.config.num_heads == 2
    assert torch.equal(
        found.state_dict()["blocks.2.ffn.up.weight"], tower.state_dict()["blocks.2.ffn.up.weight"]
    )


def test_a_model_of_transformers_is_taken_over(tmp_path: Path) -> None:
    tower = build("vit_femto", depth=3, rope_base=50.0)
    save_as(tower, tmp_path, "transformers")
    found = from_transformers(str(tmp_path))
    assert (found.config.rope_base, found.config.depth) == (50.0, 3)
    assert torch.equal(found.state_dict()["norm.weight"], tower.state_dict()["norm.weight"])


def test_a_package_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ValueError, match=r"timm cannot be imported: RuntimeError: operator torchvision::nms"):
        from_timm("vit_small_patch16_dinov3")
