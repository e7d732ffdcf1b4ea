"""Towers in the formats of other libraries: the same outputs, what is refused, and a check that sees a difference."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import _torchvision, parity  # noqa: E402
from orchestrator.models import (  # noqa: E402
    MEAN,
    PRESETS,
    STD,
    Backbone,
    Config,
    ConvNeXtConfig,
    ViTConfig,
    from_config,
    preprocess,
    preset,
)
from orchestrator.models.convert import timm_config  # noqa: E402
from orchestrator.models.export import FORMATS, Preprocessing, fitting, misfit, missing, write  # noqa: E402
from orchestrator.models.export.check import LIMIT, Difference, ReloadError, compare, sizes  # noqa: E402
from orchestrator.models.export.reload import _imported  # noqa: E402

MLP = ViTConfig(patch_size=8, dim=48, depth=2, num_heads=2, rope_base=50.0)
SWIGLU = ViTConfig(
    patch_size=14, dim=56, depth=2, num_heads=2, ffn="swiglu", ffn_hidden=99, qkv_bias=False, num_storage_tokens=0,
    separate_local_norm=True,
)  # fmt: skip
CONVNEXT = ConvNeXtConfig((1, 2, 1, 1), (8, 16, 24, 40), norm_eps=1e-3)
# Not all formats can express these.
KEY_BIAS = dataclasses.replace(MLP, key_bias=True, norm_eps=1e-6)
STRIDE_2 = dataclasses.replace(CONVNEXT, stem_stride=2)
STRIDE_3 = dataclasses.replace(CONVNEXT, stem_stride=3)
SIX = dataclasses.replace(MLP, num_channels=6)
SIX_CONVNEXT = dataclasses.replace(CONVNEXT, num_channels=6)
SMALL: dict[str, Config] = {
    "mlp": MLP,
    "swiglu": SWIGLU,
    "key_bias": KEY_BIAS,
    "convnext": CONVNEXT,
    "stride_2": STRIDE_2,
    "stride_3": STRIDE_3,
    "six": SIX,
    "six_convnext": SIX_CONVNEXT,
}
# What six bands of a file are to a model.
BANDS = {"bands": [6, 5, 3, 2, 1, 0], "range": [-100.0, 4000.0]}
# What is exported as a graph takes a second: a few of them.
PAIRS = {
    "timm": ("mlp", "swiglu", "convnext", "stride_3", "six", "six_convnext"),
    "transformers": ("mlp", "swiglu", "key_bias", "convnext", "six", "six_convnext"),
    "onnx": ("swiglu", "stride_2", "six"),
    "torch-export": ("key_bias", "stride_2", "six"),
}
CASES = [
    pytest.param(name, model, id=f"{name}-{model}") for name, models in PAIRS.items() for model in models
]


def tower(config: Config) -> Backbone:
    model = from_config(config).eval().requires_grad_(False)
    parity.randomise(model)
    return model


def written(model: Backbone, name: str, folder: Path) -> Path:
    if missing(name):
        pytest.skip(f"{missing(name)} not installed")
    preprocessing = Preprocessing(4 * model.patch_size, MEAN, STD)
    if model.config.num_channels == 6:
        preprocessing = Preprocessing(4 * model.patch_size, (*MEAN, *MEAN), (*STD, *STD), BANDS)
    write(model, name, preprocessing, folder)
    return folder


Exported = Callable[[str, str], tuple[Backbone, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The tower `model` of SMALL and its folder in the format `name`, written once."""

    @cache
    def make(name: str, model: str) -> tuple[Backbone, Path]:
        ours = tower(SMALL[model])
        return ours, written(ours, name, tmp_path_factory.mktemp("exported"))

    return make


@pytest.fixture
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes can import timm and transformers."""
    path = _torchvision.for_other_processes(tmp_path_factory.mktemp("shim"))
    monkeypatch.setenv("PYTHONPATH", path)


# --- the same outputs -------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "model"), CASES)
def test_each_format_gives_our_outputs_at_any_size(exported: Exported, name: str, model: str) -> None:
    """Read by the `load.py` that users get; one image and more, square or not."""
    ours, folder = exported(name, model)
    loader: Any = _imported(folder / "load.py")
    theirs = loader.load(str(folder))
    patch = ours.patch_size
    for batch, rows, columns in ((2, 4, 4), (1, 2, 2), (1, 2, 3), (3, 7, 2)):
        images = torch.randn(batch, ours.config.num_channels, rows * patch, columns * patch)
        given: Any = images.numpy() if name == "onnx" else images
        cls, patches = map(np.asarray, loader.features(theirs, given))
        with torch.no_grad():
            expected = ours(images)
        scale = expected.patches.abs().max().item()
        assert 1 < scale < 100
        np.testing.assert_allclose(cls, expected.cls.numpy(), atol=1e-5 * scale, rtol=0)
        np.testing.assert_allclose(patches, expected.patches.numpy(), atol=1e-5 * scale, rtol=0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [(150, 150), (150, 300)], ids=["square", "wide"])
def test_photos_are_prepared_as_ours(exported: Exported, name: str, size: tuple[int, int]) -> None:
    ours, folder = exported(name, PAIRS[name][0])
    loader: Any = _imported(folder / "load.py")
    # Smooth, as photographs are: libraries place the pixels of a resized picture a fraction of one apart.
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size).astype(np.uint8)
    photo = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1))
    given = loader.load(str(folder)) if name == "timm" else str(folder)
    np.testing.assert_allclose(
        np.asarray(loader.preprocess(given, photo)),
        preprocess(photo, 4 * ours.patch_size).numpy(),
        atol=0.06,
        rtol=0,
    )


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORMATS)
def test_bands_are_prepared_by_the_formula(exported: Exported, name: str) -> None:
    """Each format says which bands and values a model of six channels sees, and brings what makes them its input."""
    _, folder = exported(name, "six")
    told = json.loads((folder / "preprocessing.json").read_text())
    assert told == {"size": 32, "mean": [*MEAN, *MEAN], "std": [*STD, *STD], "pixels": BANDS}
    if name in ("timm", "transformers"):
        assert json.loads((folder / "config.json").read_text())["pixels"] == BANDS
    values = np.random.default_rng(0).integers(-500, 5000, (32, 32, 7)).astype(np.int16)

    made = _imported(folder / "preprocess_bands.py").preprocess(str(folder), values)  # type: ignore[attr-defined]

    # Of the model's own size, so that nothing is resampled; in float64.
    shares = ((values[:, :, [6, 5, 3, 2, 1, 0]].astype(np.float64) + 100) / 4100).clip(0, 1)
    expected = (shares - np.array([*MEAN, *MEAN])) / np.array([*STD, *STD])
    np.testing.assert_allclose(made[0].transpose(1, 2, 0), expected, atol=1e-5, rtol=0)


def test_a_published_shape_has_its_own_name_in_timm() -> None:
    named = {
        name: timm_config(config)["architecture"] for name, config in PRESETS.items() if name in parity.TIMM
    }
    assert named == parity.TIMM
    assert timm_config(PRESETS["vit_7b"])["architecture"] == "vit_7b_patch16_dinov3"


@pytest.mark.parametrize("hidden", [1, 5, 99, 1536, 4097])
@pytest.mark.parametrize("dim", [3, 48, 192, 1280])
def test_timm_rounds_the_ratio_to_our_width(dim: int, hidden: int) -> None:
    config = dataclasses.replace(SWIGLU, dim=8 * dim, ffn_hidden=hidden)
    assert int(8 * dim * timm_config(config)["model_args"]["mlp_ratio"]) == hidden


# --- what a format cannot express -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "formats"),
    [
        (MLP, ["timm", "transformers", "onnx", "torch-export"]),
        (CONVNEXT, ["timm", "transformers", "onnx", "torch-export"]),
        (KEY_BIAS, ["transformers", "onnx", "torch-export"]),
        (dataclasses.replace(MLP, norm_eps=1e-6), ["transformers", "onnx", "torch-export"]),
        (STRIDE_2, ["onnx", "torch-export"]),
        (STRIDE_3, ["timm", "onnx", "torch-export"]),
        (dataclasses.replace(CONVNEXT, stem_stride=8), ["onnx", "torch-export"]),
    ],
)
def test_the_formats_that_can_express_a_tower(config: Config, formats: list[str]) -> None:
    assert fitting(config) == formats


def test_what_a_format_cannot_express_is_said_and_not_written(tmp_path: Path) -> None:
    assert misfit(STRIDE_2, "transformers") == "stem_stride is 2; transformers' DINOv3ConvNext has 4 only"
    assert "stem_stride is 2; timm's ConvNeXt" in str(misfit(STRIDE_2, "timm"))
    assert "no bias on keys" in str(misfit(dataclasses.replace(MLP, key_bias=True), "timm"))
    assert "norm_eps is 1e-06" in str(misfit(dataclasses.replace(MLP, norm_eps=1e-6), "timm"))

    class Thin(ViTConfig):
        """Of a package, which may compute something else with the same weights."""

    assert misfit(Thin(), "timm") == "timm has no such tower: Thin is of a package of its own"
    assert misfit(Thin(), "onnx") is None
    with pytest.raises(ValueError, match="stem_stride is 2"):
        write(tower(STRIDE_2), "timm", Preprocessing(32, MEAN, STD), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnx": object(), "timm": object()}
    monkeypatch.setattr("orchestrator.models.export.formats.find_spec", installed.get)
    assert missing("onnx") == ["onnxscript", "onnxruntime"]
    assert missing("timm") == missing("torch-export") == []


# --- the check in a fresh process -------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "size"), [(8, 64), (16, 224), (14, 14), (32, 100)])
def test_the_sizes_that_are_compared(patch: int, size: int) -> None:
    found = sizes(patch, size)
    assert len({(height, width) for _, height, width in found}) == 3
    assert any(height != width for _, height, width in found)
    assert len({batch for batch, _, _ in found}) == 3
    assert all(height % patch == width % patch == 0 for _, height, width in found)


@pytest.mark.heavy
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_the_check_sees_a_weight_that_is_different(tmp_path: Path, name: str) -> None:
    ours = tower(MLP)
    folder = written(ours, name, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = compare(ours, folder, 32)
    assert [(one.batch, one.height, one.width) for one in found] == list(sizes(8, 32))
    assert [one.value for one in found] == pytest.approx([1e-3] * 3, rel=0.01)
    assert not any(one.is_small for one in found)


# A folder whose model is one of numpy: the process takes no second to start.
_FAKE = """
import json
import numpy as np

def load(folder):
    return {load}

def features(model, images):
    batch, _, height, width = images.shape
    cls, patches = np.zeros((batch, 4), np.float32), np.zeros((batch, height * width // 64, 4), np.float32)
    {change}
    return cls, patches
"""


class _Zeros(torch.nn.Module):
    patch_size = 8
    config = preset("vit_femto")

    def forward(self, images: torch.Tensor) -> Any:
        batch, _, height, width = images.shape
        kind = dataclasses.make_dataclass("Features", ["cls", "patches"])
        return kind(torch.zeros(batch, 4), torch.zeros(batch, height * width // 64, 4))


def fake(folder: Path, change: str = "", load: str = "None", head: str = "") -> list[Difference]:
    (folder / "load.py").write_text(head + _FAKE.format(change=change, load=load))
    model: Any = _Zeros()
    return compare(model, folder, 32)


def test_every_size_and_output_is_compared(tmp_path: Path) -> None:
    assert [one.value for one in fake(tmp_path)] == [0, 0, 0]
    assert [
        one.value for one in fake(tmp_path, "patches[-1, -1, -1] = -LIMIT", head=f"LIMIT = {LIMIT / 2}")
    ] == [pytest.approx(LIMIT / 2)] * 3
    large = fake(tmp_path, "cls[0, 0] = 1 if batch == 3 else 0")
    assert [one.is_small for one in large] == [True, True, False]
    assert str(large[-1]) == "1.0e+00 at 3 × 48 × 32"
    assert not any(one.is_small for one in fake(tmp_path, "patches[0, 0, 0] = np.nan"))


_HIDDEN = """
try:
    raise ValueError("no torchvision")
except ValueError:
    raise ImportError("no model")
"""


def test_what_goes_wrong_in_the_other_process_is_said(tmp_path: Path) -> None:
    for wanted, step, options in (
        ("No module named 'no_such_library'", "import", {"head": "import no_such_library\n"}),
        ("import of orchestrator halted", "import", {"head": "import orchestrator\n"}),
        ("KeyError: 'weights'", "load", {"load": "{}['weights']"}),
        ("ImportError: no model .ValueError: no torchvision.", "import", {"head": _HIDDEN}),
        (
            r"patches is \(2, 16, 5\), not \(2, 16, 4\)",
            "run",
            {"change": "patches = np.zeros((batch, 16, 5))"},
        ),
        ("its process ended with 3: it said nothing", "run", {"change": "import os; os._exit(3)"}),
    ):
        with pytest.raises(ReloadError, match=wanted) as caught:
            fake(tmp_path, **options)
        assert caught.value.step == step


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("name", FORMATS)
def test_the_code_of_the_page_gives_our_outputs(
    exported: Exported, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, folder = exported(name, PAIRS[name][0])
    (tmp_path / "nano").symlink_to(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "formats.md").read_text()
    [code] = re.findall(rf"^## {name}\n.*?^```python\n(.*?)^```$", page, flags=re.S | re.M)[:1]
    left: dict[str, Any] = {}
    exec(compile(code, "docs/formats.md", "exec"), left)
    with torch.no_grad():
        expected = ours(torch.as_tensor(left["images"]))
    np.testing.assert_allclose(np.asarray(left["cls"]), expected.cls.numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(left["patches"]), expected.patches.numpy(), atol=1e-4, rtol=0)


# --- graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "file"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")])
def test_a_graph_has_no_paths_of_this_machine(exported: Exported, name: str, file: str) -> None:
    content = (exported(name, "stride_2")[1] / file).read_bytes()
    assert b"convnext.ConvNeXt" in content, "it is not compressed"
    assert str(ROOT).encode() not in content
    assert b"/models/convnext.py" not in content


@pytest.mark.heavy
def test_the_onnx_file_has_names_and_dynamic_axes(exported: Exported) -> None:
    _, folder = exported("onnx", "stride_2")
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    [given] = session.get_inputs()
    assert given.name == "images"
    assert given.shape == ["batch", 3, "height", "width"]
    assert [output.name for output in session.get_outputs()] == ["cls", "patches"]
    assert sorted(path.name for path in folder.iterdir()) == ["load.py", "model.onnx", "preprocessing.json"]
    assert json.loads((folder / "preprocessing.json").read_text())["size"] == 64
