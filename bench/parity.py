"""With the same random weights, transformers' and timm's towers give our tokens, in fp32, both ways."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench._torchvision import mend_torchvision
from bench.harness import Claim, summarize
from orchestrator.models import Backbone, BackboneFeatures, Config, ViTConfig, from_config, preset
from orchestrator.models.convert import (
    from_layout,
    known_from_transformers,
    to_layout,
    transformers_config,
)

Direction = Literal["from", "to"]
GOAL = 1e-5
VITS = ("vit_s", "vit_s_plus", "vit_b")
CONVNEXTS = ("convnext_t", "convnext_s", "convnext_b", "convnext_l")
# Height and width: not square, and the smallest square one that a stride of 32 leaves more than one cell of.
SIZES = ((64, 96), (64, 64))
TIMM = {
    "vit_s": "vit_small_patch16_dinov3_qkvb",
    "vit_s_plus": "vit_small_plus_patch16_dinov3_qkvb",
    "vit_b": "vit_base_patch16_dinov3_qkvb",
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "convnext_l": "convnext_large",
}
Theirs = tuple[nn.Module, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Difference:
    """`error`: the largest absolute difference of a token's entry. `scale`: the largest entry."""

    error: float
    scale: float

    @property
    def relative(self) -> float:
        return self.error / self.scale


def run(quick: bool) -> Claim:
    """Compare ViT-S, S+, B and the ConvNeXts; quickly, the smallest of both."""
    layouts = ["transformers", *(["timm"] if timm() is not None else [])]
    models = ("vit_s", "convnext_t") if quick else (*VITS, *CONVNEXTS)
    sizes = SIZES[:1] if quick else SIZES
    arms, notes = {}, []
    for model, layout in product(models, layouts):
        for direction, found in compare(preset(model), layout, sizes, timm_name=TIMM[model]).items():
            arm = f"{model} {direction} {layout}"
            arms[arm] = summarize([difference.relative for difference in found])
            error = max(difference.error for difference in found)
            scale = max(difference.scale for difference in found)
            notes.append(f"{arm}: max abs error {error:.1e}, largest entry {scale:.1f}")
    if "timm" not in layouts:
        notes.append("timm is not installed: not compared")
    shown = ", ".join(f"{height} x {width}" for height, width in sizes)
    notes.append(f"CLS, storage and patch tokens of two images each of {shown} px; every weight perturbed")
    claim = "our towers give the tokens of transformers' and timm's, both ways"
    worst = max(arm.high for arm in arms.values())
    return Claim(claim, worst, "of the largest entry", GOAL, None, arms, notes)


@torch.no_grad()
def compare(
    config: Config, layout: str, sizes: Sequence[tuple[int, int]] = SIZES, timm_name: str = ""
) -> dict[Direction, list[Difference]]:
    """Tokens of our tower and of theirs with the same random weights: a difference for each direction and size.

    "from" draws the weights in their tower and converts them to ours, "to" draws them in ours.

    Args:
        layout: "transformers" or "timm"; the latter needs `timm_name`.
    """
    theirs, tokens = timm_tower(config, timm_name) if layout == "timm" else _transformers(config)
    known = known_from_transformers(transformers_config(config)) if layout == "transformers" else {}
    with torch.device("meta"):
        ours: Backbone = from_config(config).eval()
    randomise(theirs)
    read, state = from_layout(theirs.state_dict(), layout, **known)
    assert read == config, (read, config)
    ours.load_state_dict(state, assign=True)
    found: dict[Direction, list[Difference]] = {"from": _differences(ours, tokens, sizes)}
    randomise(ours, seed=1)
    theirs.load_state_dict(to_layout(ours.state_dict(), config, layout), assign=True)
    return found | {"to": _differences(ours, tokens, sizes)}


def _differences(
    ours: Backbone, tokens: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, int]]
) -> list[Difference]:
    found = []
    for size in sizes:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
        expected, got = tokens(images), joined(ours(images))
        assert got.shape == expected.shape, (got.shape, expected.shape)
        found.append(Difference((got - expected).abs().max().item(), expected.abs().max().item()))
    return found


def joined(features: BackboneFeatures) -> Tensor:
    """(B, 1 + S + P, D): CLS, storage tokens, patches."""
    return torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size at which all of them, biases, gains, scales and tokens too, show in the output."""
    # One bank of prime length, read from a place of each weight's own: drawing 200M numbers takes seconds.
    bank = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start, size = zlib.crc32(name.encode()) % len(bank), parameter.numel()
            noise = bank.roll(-start).repeat(size // len(bank) + 1)[:size].view(parameter.shape)
            if "token" in name:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)


def timm() -> Any:
    """timm, or None if it is not installed."""
    if find_spec("timm") is None or find_spec("torchvision") is None:
        return None
    mend_torchvision()
    return importlib.import_module("timm")


def _transformers(config: Config) -> Theirs:
    import transformers
    from transformers.initialization import no_init_weights

    values = transformers_config(config)
    kind = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with no_init_weights():  # all weights are replaced
        model = transformers.AutoModel.from_config(kind).eval()
    return model, lambda images: model(images).last_hidden_state


def timm_tower(config: Config, name: str) -> Theirs:
    """timm's tower called `name`, and how to get its normed tokens (B, N, D)."""
    library = timm()
    if isinstance(config, ViTConfig):
        model = library.create_model(name, num_classes=0, dynamic_img_size=True).eval()
        return model, model.forward_features
    with torch.device("meta"):
        model = library.create_model(name, num_classes=0).eval()
    model.to_empty(device="cpu")

    def tokens(images: Tensor) -> Tensor:
        cells = model.head.norm(model.forward_features(images)).flatten(2).transpose(1, 2)
        return torch.cat([model(images)[:, None], cells], dim=1)

    return model, tokens
