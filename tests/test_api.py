"""The functions that `import orchestrator` gives, used as a user would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import orchestrator
from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.models import embed as embed_one

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "numpy", "pandas", "sklearn", "pyarrow", "pydantic", "typer")
PIPELINE = """\
name: small
data: {photos: {path: photos}}
stages:
  curate: {kind: curate, data: photos, clusters: 2, near_duplicate: 0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos, a pipeline file and a trained model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "small.yaml").write_text(PIPELINE)
    torch.manual_seed(0)
    save_pretrained("model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Path:
    """The folder of a trained model."""
    return folder / "model"


def test_importing_the_package_loads_nothing() -> None:
    code = f"import sys, orchestrator; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_what_a_stage_is_made_of_loads_no_torch() -> None:
    """A package's stages, metrics and shapes are imported to plan: that stays light."""
    names = ("Stage", "Metric", "Objective", "Augmentation", "ViTConfig", "CachedStore", "run", "embed")
    code = (
        f"import sys, orchestrator; [getattr(orchestrator, name) for name in {names!r}]\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", orchestrator.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(orchestrator, name)
    assert name in dir(orchestrator)
    if name != "__version__":
        assert found.__doc__, f"{name} has no docstring"


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="'orchestrator' has no attribute 'trian'"):
        orchestrator.trian  # noqa: B018


def test_the_names_that_load_late_are_those_that_types_know() -> None:
    source = (ROOT / "orchestrator/__init__.py").read_text()
    source = re.sub(
        r"import \((.+?),\s*\)", lambda names: f"import {' '.join(names[1].split())}", source, flags=re.S
    )
    for module, names in orchestrator._HOMES.items():
        assert f"    from orchestrator.{module} import {', '.join(names)}\n" in source, module
    late = {name for names in orchestrator._HOMES.values() for name in names}
    assert late | {"__version__"} == set(orchestrator.__all__)


# --- pipelines --------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_plan_run_and_plan_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = orchestrator.plan("small.yaml")
    assert [(stage.kind, stage.action) for stage in before.values()] == [("curate", "run")]
    assert not Path("runs").exists(), "planning changes nothing"
    results = orchestrator.run("small.yaml", "stages.curate.sample=0.4", quiet=True)
    assert capfd.readouterr().out == ""
    assert results["curate"].summary["unique"] == 5
    assert (results["curate"].folder() / "index.parquet").is_file()
    after = orchestrator.plan(Path("small.yaml"), "stages.curate.sample=0.4")
    assert (after["curate"].action, after["curate"].key) == ("cached", results["curate"].key)
    assert before["curate"].key != after["curate"].key
    assert (
        orchestrator.plan("small.yaml", "stages.curate.sample=0.4", force=["curate"])["curate"].action
        == "run"
    )


def test_mistakes_are_user_errors(folder: Path) -> None:
    for call in (orchestrator.plan, orchestrator.run):
        with pytest.raises(orchestrator.UserError, match="did you mean 'clusters'"):
            call("small.yaml", "stages.curate.clusterz=3")
        with pytest.raises(orchestrator.UserError, match="no such folder: nowhere"):
            call("small.yaml", "data.photos.path=nowhere")
        with pytest.raises(orchestrator.UserError, match="curate"):
            call("small.yaml", only=["curat"])


@pytest.mark.heavy
def test_a_stage_that_fails_is_a_run_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.stages.curate.config import Curate

    def fail(self: Curate, context: orchestrator.Context) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Curate, "run", fail)
    with pytest.raises(orchestrator.RunError, match="orchestrator status") as caught:
        orchestrator.run("small.yaml", quiet=True)
    assert caught.value.exit_code == 1


# --- models -----------------------------------------------------------------------------------------------------


def test_a_folder_of_weights_embeds_photos(folder: Path) -> None:
    model = orchestrator.load("model")
    assert model.image_size == 16
    photos = sorted(Path("photos").glob("*.png"))
    vectors = orchestrator.embed(model, photos, batch=2)
    assert (vectors.shape, vectors.dtype) == ((5, 48), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    with Image.open(photos[3]) as image:
        alone = embed_one(model.module, image, 16).numpy()
        for given in (photos[3], str(photos[3]), image, np.asarray(image)):
            np.testing.assert_allclose(orchestrator.embed("model", given), alone, atol=1e-5)
    np.testing.assert_allclose(vectors[3], alone, atol=1e-5)
    assert orchestrator.embed(model, []).shape[0] == 0


def test_the_folder_of_an_artifact_will_do(folder: Path) -> None:
    Path("artifact").mkdir()
    Path("model").rename("artifact/model")
    assert orchestrator.load(folder / "artifact").image_size == 16


def test_what_cannot_be_loaded_or_embedded_is_a_user_error(folder: Path) -> None:
    Path("photos/none.png").write_text("no image")
    model = orchestrator.load("model")
    for expected, call in (
        ("no model can be loaded", lambda: orchestrator.load("nowhere")),
        ("no model can be loaded", lambda: orchestrator.load("photos")),
        ("this is not an image", lambda: orchestrator.embed(model, "photos/none.png")),
        ("no such file", lambda: orchestrator.embed(model, "photos/missing.png")),
        ("patches of 8 pixels do not fill 20", lambda: orchestrator.embed(model, "photos/0.png", size=20)),
        ("not known at which size", lambda: orchestrator.embed(model.module, "photos/0.png")),
        ("no text tower", lambda: orchestrator.embed(model, texts=["a photo"])),
        ("images or texts", lambda: orchestrator.embed(model)),
    ):
        with pytest.raises(orchestrator.UserError, match=expected):
            call()


# --- files and arguments from anywhere ------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "a list": "[]", "a text": '"x"', "null": "null", "deep": "[" * 100_000, "cut": "{",
    "no config": '{"format": 2, "architecture": "vit", "config": null}',
    "unknown": '{"format": 2, "architecture": "resnet", "config": {}}',
    "endless": '{"format": 2, "architecture": "vit", "config": {"depth": 1000000000}}',
    "wide": '{"format": 2, "architecture": "vit", "config": {"dim": 1000000000}}',
    "no heads": '{"format": 2, "architecture": "vit", "config": {"num_heads": 0}}',
    "huge patch": '{"format": 2, "architecture": "vit", "config": {"patch_size": 1000000000}}',
    "odd key": '{"format": 2, "architecture": "vit", "config": {"colour": "red"}}',
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_config_from_anywhere_is_one_error(model: Path, name: str) -> None:
    record = WRONG_CONFIGS[name].replace(
        '"format": 2', f'"format": {json.loads((model / "config.json").read_text())["format"]}'
    )
    (model / "config.json").write_text(record)
    with pytest.raises(UserError, match="no model can be loaded") as caught:
        orchestrator.load(model)
    assert caught.value.hint


@pytest.mark.parametrize("size", [-1, 0, 10**9, [1], "32"])
def test_an_image_size_from_anywhere_is_one_error(model: Path, size: object) -> None:
    record = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(record | {"extra": {"image_size": size}}))
    with pytest.raises(UserError, match="image_size"):
        orchestrator.load(model)


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_weights_that_are_cut_are_one_error(model: Path, keep: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(UserError, match="no model can be loaded"):
        orchestrator.load(model)


@pytest.mark.parametrize("image", [5, b"x", [[1, 2]], (one for one in ""), np.zeros((0, 0, 3), np.uint8)])
def test_what_is_no_image_is_one_error(model: Path, image: object) -> None:
    with pytest.raises(UserError):
        orchestrator.embed(model, image, size=32)  # type: ignore[arg-type]


def test_a_pipe_is_not_waited_for(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match="not an image"):
        orchestrator.embed(model, tmp_path / "pipe.jpg", size=32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": -32},
        {"size": 0},
        {"size": "32"},
        {"size": 10**9},
        {"batch": 0},
        {"batch": -1},
        {"batch": "2"},
    ],
)
def test_numbers_that_cannot_work_are_refused(model: Path, wrong: dict[str, Any]) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(UserError, match=next(iter(wrong))):
        orchestrator.embed(model, pixels, **({"size": 32} | wrong))


@pytest.mark.parametrize(
    "how", [{"only": 5}, {"only": None}, {"only": [None]}, {"first": 5}, {"last": b"x"}, {"force": {1: 2}}]
)
def test_names_that_are_none_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not the name of a stage"):
        orchestrator.plan(tmp_path / "p.yaml", **how)
    with pytest.raises(UserError, match="an override is a text"):
        orchestrator.plan(tmp_path / "p.yaml", 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, None, [1], b"x"])
def test_what_is_no_path_is_one_error(value: Any) -> None:
    with pytest.raises(UserError, match="not a path"):
        orchestrator.load(value)
    with pytest.raises(UserError, match="not a path"):
        orchestrator.plan(value)
    with pytest.raises(UserError, match="not a model"):
        orchestrator.embed(value, np.zeros((32, 32, 3), np.uint8), size=32)
