"""The functions that `import orchestrator` gives, used as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import orchestrator
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
        ("this is no image", lambda: orchestrator.embed(model, "photos/none.png")),
        ("this is no image", lambda: orchestrator.embed(model, "photos/missing.png")),
        ("patches of 8 pixels do not fill 20", lambda: orchestrator.embed(model, "photos/0.png", size=20)),
        ("not known at which size", lambda: orchestrator.embed(model.module, "photos/0.png")),
        ("no text tower", lambda: orchestrator.embed(model, texts=["a photo"])),
        ("images or texts", lambda: orchestrator.embed(model)),
    ):
        with pytest.raises(orchestrator.UserError, match=expected):
            call()
