"""Any backbone as a headless teacher: what it says is what the network itself says, and nothing is guessed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import parity
from orchestrator.models import build, save_pretrained
from orchestrator.models.convert import save_as
from orchestrator.models.network_spec import Blocks
from orchestrator.models.wrapped import ForeignNet, open_any, open_module, open_timm, open_transformers

SIZE = 64


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["vit_femto", "convnext_mini"])
@pytest.mark.parametrize("layout", ["folder", "hub", "torch"])
def test_our_weights_in_any_layout(name: str, layout: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = build(name).eval()
    path = tmp_path / "model"
    if layout == "folder":
        save_pretrained(path, net.state_dict(), name)
    elif layout == "hub":
        save_as(net, path, "hub")
        path = path / "model.safetensors"
    else:
        path = tmp_path / "model.pth"
        torch.save(net.state_dict(), path)
    teacher = open_any(path, SIZE)
    assert (teacher.dim, teacher.grid) == (net.dim, (SIZE // net.patch_size,) * 2)
    said, wanted = teacher(images()), net(images())
    torch.testing.assert_close(said.cls, wanted.cls)
    torch.testing.assert_close(said.patches, wanted.patches)
    assert not teacher.train().net.training, "frozen"
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


class Says(nn.Module):
    """Gives what a test wants, made of the mean colour of a grid of cells so that positions can be told."""

    def __init__(self, form: str, cells: int = 4) -> None:
        super().__init__()
        self.form, self.cells = form, cells

    def forward(self, x: Tensor) -> Any:
        map_BCHW = nn.functional.adaptive_avg_pool2d(x, self.cells)
        tokens = map_BCHW.flatten(2).transpose(1, 2)
        cls = 7 + x.mean(dim=(2, 3))
        return {
            "map": lambda: map_BCHW,
            "grid": lambda: tokens,
            "cls first": lambda: torch.cat([cls[:, None], tokens], dim=1),
            "dict": lambda: {"cls": cls, "patches": tokens},
            "tuple": lambda: (cls, map_BCHW),
            "vector": lambda: cls,
            "no grid": lambda: torch.cat([cls[:, None], cls[:, None], tokens], dim=1),
            "widths": lambda: (cls[:, :2], tokens),
            "whole": lambda: map_BCHW.long(),
            "list": lambda: [map_BCHW, "and more"],
            "raises": lambda: map_BCHW @ tokens,
        }[self.form]()


@pytest.mark.parametrize("form", ["map", "grid", "cls first", "dict", "tuple"])
def test_forms_of_output(form: str) -> None:
    teacher = ForeignNet(Says(form), SIZE)
    assert (teacher.dim, teacher.grid) == (3, (4, 4))
    said = teacher(images())
    map_BCHW = nn.functional.adaptive_avg_pool2d(images(), 4)
    torch.testing.assert_close(said.patches, map_BCHW.flatten(2).transpose(1, 2))
    mean = images().mean(dim=(2, 3))
    torch.testing.assert_close(said.cls, mean if form in ("map", "grid") else 7 + mean)


def test_channels_last_where_the_width_is_known() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_avg_pool2d(x, 4).permute(0, 2, 3, 1)

    teacher = ForeignNet(Last(), SIZE, dim=3)
    assert (teacher.dim, teacher.grid) == (3, (4, 4))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("vector", r"it gives float32 \(2, 3\); expected a map"),
        ("no grid", r"float32 \(2, 18, 3\): after 1 tokens in front, no square grid"),
        ("widths", r"for 2 images it gives cls \(2, 2\) and patches \(2, 16, 3\)"),
        ("whole", r"it gives int64 \(2, 3, 4, 4\)"),
        ("list", r"it gives \(float32 \(2, 3, 4, 4\), str\)"),
        ("raises", r"it cannot take images of 64 x 64 pixels: RuntimeError"),
    ],
)
def test_unclear_outputs_are_told(form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForeignNet(Says(form), SIZE)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's module with a network in it."""
    (tmp_path / "their_nets").mkdir()
    (tmp_path / "their_nets" / "__init__.py").touch()
    (tmp_path / "their_nets" / "small.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 5, 16, 16), nn.GELU())\n"
        "def wrong():\n    return 3\n"
        "value = 1\n"
    )
    (tmp_path / "their_nets" / "broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("their_nets")]:
        del sys.modules[name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_module_path_with_weights(package: Path, suffix: str) -> None:
    state = {"0.weight": torch.randn(5, 3, 16, 16), "0.bias": torch.randn(5)}
    path = package / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    teacher = open_module("their_nets.small:make", path, SIZE)
    wanted = nn.functional.gelu(nn.functional.conv2d(images(), state["0.weight"], state["0.bias"], 16))
    torch.testing.assert_close(teacher(images()).patches, wanted.flatten(2).transpose(1, 2))


def test_a_module_path_with_arguments(package: Path) -> None:
    kwargs = {"in_channels": 3, "out_channels": 7, "kernel_size": 16, "stride": 16}
    assert open_module("torch.nn:Conv2d", None, SIZE, kwargs).dim == 7
    with pytest.raises(ValueError, match=r"torch\.nn:Conv2d\(width=3\) fails: TypeError"):
        open_module("torch.nn:Conv2d", None, SIZE, {"width": 3})


def test_modules_and_weights_that_do_not_fit(package: Path) -> None:
    save_file({"0.weight": torch.zeros(5, 3, 16, 16)}, package / "half.safetensors")
    with pytest.raises(ValueError, match=r"does not fit their_nets.small:make: (.|\n)*0.bias"):
        open_module("their_nets.small:make", package / "half.safetensors", SIZE)
    with pytest.raises(ValueError, match=r"gives int, not an nn\.Module"):
        open_module("their_nets.small:wrong", None, SIZE)
    with pytest.raises(ValueError, match=r"their_nets\.small has nothing called 'value' that can be called"):
        open_module("their_nets.small:value", None, SIZE)
    with pytest.raises(
        ValueError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"
    ):
        open_module("their_nets.broken:make", None, SIZE)


def test_a_vit_of_transformers_at_another_size(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    teacher = open_transformers(str(tmp_path), SIZE)
    assert (teacher.dim, teacher.grid) == (16, (4, 4))
    with torch.no_grad():
        wanted = model(images(), interpolate_pos_encoding=True).last_hidden_state
    said = teacher(images())
    torch.testing.assert_close(said.cls, wanted[:, 0])
    torch.testing.assert_close(said.patches, wanted[:, 1:])


@pytest.mark.parametrize("kind", ["dinov3", "convnext", "siglip"])
def test_registers_maps_and_image_and_text_models_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "dinov3":
        config = transformers.DINOv3ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_register_tokens=4,
        )
    elif kind == "convnext":
        config = transformers.ConvNextConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.SiglipConfig(
            text_config={**sizes, "vocab_size": 20},
            vision_config={**sizes, "image_size": SIZE, "patch_size": 16},
        )
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    teacher = open_transformers(str(tmp_path), SIZE)
    with torch.no_grad():
        out = (model.vision_model if kind == "siglip" else model)(images())
    said, hidden = teacher(images()), out.last_hidden_state
    patches = {
        "dinov3": lambda: hidden[:, 5:],
        "convnext": lambda: hidden.flatten(2).transpose(1, 2),
        "siglip": lambda: hidden,
    }[kind]()
    cls = hidden[:, 0] if kind == "dinov3" else out.pooler_output
    torch.testing.assert_close(said.patches, patches)
    torch.testing.assert_close(said.cls, cls)


def test_no_such_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="transformers does not give"):
        open_transformers(str(tmp_path / "nothing"), SIZE)


@pytest.mark.heavy
@pytest.mark.skipif(parity.timm() is None, reason="timm is not installed")
@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [("vit_tiny_patch16_224", 1), ("resnet10t", None), ("swin_tiny_patch4_window7_224", -1)],
)
def test_models_of_timm_with_random_weights(name: str, num_prefix: int | None) -> None:
    teacher = open_timm(name, SIZE if num_prefix != -1 else 224, pretrained=False)
    seen = images(teacher.size)
    with torch.no_grad():
        out = teacher.net.forward_features(seen)  # type: ignore[operator]
    said = teacher(seen)
    if num_prefix == 1:
        assert teacher.grid == (4, 4)
        torch.testing.assert_close(said.cls, out[:, 0])
        torch.testing.assert_close(said.patches, out[:, 1:])
        return
    patches = out.flatten(1, 2) if num_prefix == -1 else out.flatten(2).transpose(1, 2)
    torch.testing.assert_close(said.patches, patches)
    torch.testing.assert_close(said.cls, patches.mean(dim=1))


@pytest.mark.skipif(parity.timm() is None, reason="timm is not installed")
def test_no_such_model_of_timm() -> None:
    with pytest.raises(ValueError, match="timm does not give 'vit_tinny'"):
        open_timm("vit_tinny", SIZE, pretrained=False)


# --- single blocks ------------------------------------------------------------------------------------------------


def seen_by(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a layer gave while `run` ran, by a hook: independent of how the network hands its blocks out."""
    found: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        run()
    handle.remove()
    return found[-1]


def test_blocks_of_our_towers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = build("vit_femto", depth=3).eval()
    save_pretrained(tmp_path, net.state_dict(), "vit_femto", overrides={"depth": 3})
    first, second = (net.norm(seen_by(net.blocks[at], lambda: net(images()))) for at in (0, 1))
    said = open_any(tmp_path, SIZE, Blocks(cls=1, patches=2))(images())
    torch.testing.assert_close(said.cls, first[:, 0])
    torch.testing.assert_close(said.patches, second[:, 5:])
    last = open_any(tmp_path, SIZE)(images())
    torch.testing.assert_close(open_any(tmp_path, SIZE, Blocks(cls=1))(images()).patches, last.patches)
    with pytest.raises(ValueError, match="there is no block 4: it has blocks 1 to 3"):
        open_any(tmp_path, SIZE, Blocks(patches=4))


def test_stages_of_our_convnext(tmp_path: Path) -> None:
    net = build("convnext_mini").eval()
    save_pretrained(tmp_path, net.state_dict(), "convnext_mini")
    teacher = open_any(tmp_path, SIZE, Blocks(3, 3))
    assert (teacher.dim, teacher.grid) == (96, (8, 8))
    with pytest.raises(ValueError, match=r"it gives cls \(2, 96\) and patches \(2, 16, 192\)"):
        open_any(tmp_path, SIZE, Blocks(3, 4))


@pytest.mark.parametrize("kind", ["dinov2", "vit", "dinov3"])
def test_blocks_of_transformers(kind: str, tmp_path: Path) -> None:
    """CLS of the block before the last, patches of the last, as the DINOv2 relative of the demo speaks."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    config = {
        "dinov2": lambda: transformers.Dinov2Config(**sizes, image_size=SIZE, patch_size=16),
        "vit": lambda: transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=16),
        "dinov3": lambda: transformers.DINOv3ViTConfig(**sizes, num_register_tokens=4),
    }[kind]()
    torch.manual_seed(2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    norm = model.norm if kind == "dinov3" else model.layernorm
    with torch.no_grad():
        norm.weight.mul_(torch.linspace(0.5, 2, 16))
    model.save_pretrained(tmp_path)
    layers = [each for name, each in model.named_modules() if re.search(r"(layer|layers)\.\d+$", name)]
    assert len(layers) == 3
    second, third = (norm(seen_by(layers[at], lambda: model(images()))) for at in (1, 2))
    said = open_transformers(str(tmp_path), SIZE, blocks=Blocks(cls=2))(images())
    torch.testing.assert_close(said.cls, second[:, 0])
    torch.testing.assert_close(said.patches, third[:, 5 if kind == "dinov3" else 1 :])
    with pytest.raises(ValueError, match="there is no block 12: it has blocks 1 to 3"):
        open_transformers(str(tmp_path), SIZE, blocks=Blocks(cls=12))


@pytest.mark.skipif(parity.timm() is None, reason="timm is not installed")
def test_blocks_of_timm() -> None:
    torch.manual_seed(3)
    teacher = open_timm(
        "vit_tiny_patch16_224", SIZE, pretrained=False, kwargs={"depth": 3}, blocks=Blocks(cls=1, patches=2)
    )
    net: Any = teacher.net
    first, second = (
        net.norm(seen_by(net.blocks[at], lambda: net.forward_features(images()))) for at in (0, 1)
    )
    said = teacher(images())
    torch.testing.assert_close(said.cls, first[:, 0])
    torch.testing.assert_close(said.patches, second[:, 1:])
    with pytest.raises(ValueError, match="timm's resnet10t is not a transformer"):
        open_timm("resnet10t", SIZE, pretrained=False, blocks=Blocks(1, 1))


class Offering(nn.Module):
    """A network that offers its blocks as DINO's networks do; block b adds b to the mean colours of a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(4))

    def get_intermediate_layers(
        self, x: Tensor, n: Any, return_class_token: bool, norm: bool
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        assert return_class_token
        assert norm
        tokens = nn.functional.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return tuple((tokens + 1 + at, tokens.mean(dim=1) - 1 - at) for at in range(4) if at in n)


def test_blocks_of_a_users_module() -> None:
    teacher = open_module(f"{__name__}:Offering", None, SIZE, blocks=Blocks(cls=4, patches=2))
    said = teacher(images())
    tokens = nn.functional.adaptive_avg_pool2d(images(), 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(said.cls, tokens.mean(dim=1) - 4)
    torch.testing.assert_close(said.patches, tokens + 2)
    with pytest.raises(ValueError, match="there is no block 5: it has blocks 1 to 4"):
        open_module(f"{__name__}:Offering", None, SIZE, blocks=Blocks(cls=5))
    with pytest.raises(ValueError, match="does not offer its blocks: it needs `blocks` and the method"):
        open_module(f"{__name__}:Says", None, SIZE, {"form": "map"}, Blocks(1, 1))
