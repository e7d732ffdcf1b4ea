"""`pull --format`: one folder or one message, and what the page and the command line say of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command_line import command_line
from safetensors.torch import save_file

from orchestrator.cli.pull import Format
from orchestrator.errors import UserError
from orchestrator.inference import export
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.models.export import FORMATS, check
from orchestrator.tracking.download import Pulled

ROOT = Path(__file__).parents[2]


def published(folder: Path, preset: str = "vit_femto", **overrides: Any) -> Path:
    model = build(preset, **overrides)
    save_pretrained(folder, model.state_dict(), preset, {"image_size": 32}, overrides)
    (folder / "README.md").write_text("# food-femto\n\nA card.\n")
    return folder


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that every reference means, in the place of a registry."""

    def fetch(reference: str, out: Path, uri: str, store: str | None = None) -> Pulled:
        shutil.copytree(tmp_path / "registry", out)
        return Pulled(reference, 3, "champion", out)

    monkeypatch.setattr(export, "fetch", fetch)
    return tmp_path / "registry"


@pytest.mark.heavy
def test_a_folder_that_its_library_loads(registry: Path, tmp_path: Path) -> None:
    """The whole way, another process too; torch.export is always installed."""
    published(registry)
    found = export.pull_as("torch-export", "food-femto", tmp_path / "out", "sqlite:///none.db")
    assert str(found.pulled) == "food-femto version 3 (@champion)"
    assert found.pulled.folder == tmp_path / "out"
    assert [one.is_small for one in found.differences] == [True] * 3
    out = found.pulled.folder
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "load.py",
        "model.pt2",
        "preprocessing.json",
    }
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    readme = (out / "README.md").read_text()
    assert "# food-femto version 3, for torch.export" in readme
    assert (out / "load.py").read_text() in readme
    assert readme.endswith("\n---\n\n# food-femto\n\nA card.\n")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    theirs = torch.export.load(out / "model.pt2").module()
    images = torch.randn(1, 3, 16, 40)
    torch.testing.assert_close(theirs(images)[0], load_pretrained(registry)(images).cls)


def refusal(name: str, out: Path) -> UserError:
    """The message, after which nothing is left."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export.pull_as(name, "food-femto", out, "sqlite:///none.db")
    assert set(out.parent.iterdir()) == before
    return caught.value


def fake_check(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    def compare(*_: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(check, "compare", compare)


def test_that_the_head_of_a_fine_tuned_model_is_left_out_is_told(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other library makes its predictions: what is pulled gives features."""
    published(registry)
    record = json.loads((registry / "config.json").read_text())
    record["extra"]["head"] = {"type": "segmentation", "classes": ["a", "b"]}
    (registry / "config.json").write_text(json.dumps(record))
    save_file({"last.bias": torch.zeros(2)}, registry / "head.safetensors")
    fake_check(monkeypatch, [check.Difference(1, 16, 16, 0.0)])
    code, said = command_line(
        "pull", "food-femto", "--format", "torch-export", "--out", "out", folder=tmp_path, toy=False
    )
    assert code == 0, said
    assert "! the head for segmentation is left out, and `orchestrator pull` without --format has it" in said
    assert "features alone: the head for segmentation is left out" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("value", [2e-4, float("nan")])
def test_other_outputs_are_refused_with_the_figure(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    published(registry)
    fake_check(monkeypatch, [check.Difference(2, 32, 32, 1e-6), check.Difference(1, 16, 40, value)])
    error = refusal("transformers", tmp_path / "out")
    figure = f"{value:.1e}"
    assert f"the largest difference is {figure} at 1 × 16 × 40, above 1e-04" in error.what
    assert "onnx, torch-export" in (error.hint or "")


@pytest.mark.parametrize(
    ("step", "said", "what", "hint"),
    [
        (
            "import",
            "RuntimeError: operator torchvision::nms does not exist",
            "timm cannot be imported",
            "torchvision",
        ),
        ("import", "ImportError: no huggingface_hub", "timm cannot be imported", "dinov3-orchestrator[timm]"),
        ("load", "KeyError: 'norm'", "timm does not load it: KeyError", "use a format that can"),
    ],
)
def test_a_library_that_fails_is_named(
    registry: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    said: str,
    what: str,
    hint: str,
) -> None:
    published(registry)
    fake_check(monkeypatch, check.ReloadError(step, said))
    error = refusal("timm", tmp_path / "out")
    assert what in error.what
    assert hint in (error.hint or "")


def test_what_a_format_cannot_express_is_refused_with_those_that_can(registry: Path, tmp_path: Path) -> None:
    published(registry, "convnext_mini")
    error = refusal("timm", tmp_path / "out")
    assert error.what.startswith(
        "food-femto version 3 (@champion) cannot be written as timm: stem_stride is 2"
    )
    assert error.hint == "use a format that can: safetensors, onnx, torch-export"


def test_what_is_no_backbone_is_refused(registry: Path, tmp_path: Path) -> None:
    registry.mkdir()
    (registry / "config.json").write_text('{"format": 3, "output_dim": 64, "image_size": 32}')
    error = refusal("onnx" if not export.missing("onnx") else "torch-export", tmp_path / "out")
    assert "it is a text-aligned model, of two towers and a tokenizer" in error.what
    assert error.hint == "use a format that can: safetensors"
    for record in ("{}", "[1]", '{"format": 9, "architecture": "vit"}', "no JSON"):
        (registry / "config.json").write_text(record)
        error = refusal("torch-export", tmp_path / "out")
        assert "it is not a backbone that can be loaded here" in error.what


@pytest.mark.parametrize("pixels", [{"range": 7}, {"bands": "all"}, [1], {"import": "os"}])
def test_a_folder_that_says_something_else_of_pixels_is_refused(
    registry: Path, tmp_path: Path, pixels: object
) -> None:
    config = published(registry) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pixels": pixels}))
    with pytest.raises(UserError, match=r"`pixels` of its config\.json is not valid"):
        export.pull_as("torch-export", "food-femto", tmp_path / "out", "sqlite:///none.db")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_found_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "missing", lambda name: ["onnxscript", "onnxruntime"])
    error = refusal("onnx", tmp_path / "out")
    assert error.what == "onnxscript and onnxruntime are not installed, and --format onnx needs them"
    torch = version("torch").partition("+")[0]
    assert f"pip install 'dinov3-orchestrator[onnx]' torch=={torch}: pip may" in str(error.hint)
    error = refusal("torchexport", tmp_path / "out")
    assert error.hint == "did you mean torch-export?"
    monkeypatch.setattr(export, "missing", lambda name: [])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in refusal("onnx", tmp_path / "full").what
    with pytest.raises(UserError, match="cannot be made"):
        export.pull_as("onnx", "food-femto", tmp_path / "full" / "file" / "out", "sqlite:///none.db")


@pytest.mark.heavy
def test_the_command_line_has_every_format_and_prints_the_differences(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_args(Format) == ("safetensors", *FORMATS)
    published(registry)
    fake_check(monkeypatch, [check.Difference(2, 32, 32, 1.26e-6)])
    code, said = command_line(
        "pull", "food-femto", "--format", "torch-export", "--out", str(tmp_path / "out"), folder=tmp_path
    )
    assert code == 0, said
    assert "2 × 32 × 32      largest difference 1.3e-06" in said
    assert re.search(r"food-femto version 3 \(@champion\) is in .*out for torch.export", said)
    code, said = command_line("pull", "food-femto", "--format", "onx", "--out", "x", folder=tmp_path)
    assert code == 2
    assert "torch-export" in said


def test_the_extras_are_those_of_pyproject() -> None:
    import tomllib

    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for chosen in map(dataclasses.asdict, FORMATS.values()):
        if chosen["extra"] is not None:
            wanted = [re.split(r"[><=\[]", requirement)[0] for requirement in optional[chosen["extra"]]]
            assert wanted == list(chosen["packages"])
