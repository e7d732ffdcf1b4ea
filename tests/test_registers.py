"""What a program registers by call: used by name in its own process, and in those of a run outside the repository."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orchestrator
from orchestrator import installed
from orchestrator.errors import UserError
from orchestrator.models import presets
from orchestrator.pipeline.load import load
from orchestrator.reference.explain import explain
from orchestrator.reference.json_schema import schema
from orchestrator.reference.model_table import model_rows
from orchestrator.stages import registry
from orchestrator.storage.open import open_store

ROOT = Path(__file__).parents[1]
MODULE = '''
import pathlib
from typing import Literal

import orchestrator

THIN = orchestrator.ViTConfig(dim=24, depth=1, num_heads=1, patch_size=8, layer_scale_init=0.1)
orchestrator.register_model("vit_thin", "mine:THIN")


@orchestrator.register_stage("graded")
class Graded(orchestrator.Stage):
    """Grades photos."""

    kind: Literal["graded"]
    needs_ray = False
    inputs = (orchestrator.Input("index", ("curate",)),)

    def run(self, context):
        (context.out / "grade.txt").write_text("3")
        return {"grade": 3.0}


@orchestrator.register_objective("length")
class Length(orchestrator.Objective):
    """The length of the features."""

    def loss(self, output): return output.cls_GBD.norm(dim=-1).mean()


@orchestrator.register_metric("counted")
class Counted(orchestrator.Metric):
    """Counts photos."""

    def measure(self, features): return {"photos": float(len(features.cls_ND))}


@orchestrator.register_augmentation("inverted")
class Inverted(orchestrator.Augmentation):
    """Inverts colours."""

    def apply(self, pixels_HWC, rng): return 255 - pixels_HWC


@orchestrator.register_teacher("edges")
def edges():
    from torch import nn

    return nn.Conv2d(3, 8, 8, stride=8)


@orchestrator.register_store("shelf")
class Shelf(orchestrator.CachedStore):
    """A folder beside this file."""

    base = pathlib.Path(__file__).parent / "shelf"

    def put_bytes(self, name, data):
        path = self.base / orchestrator.checked_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".new").write_bytes(data)
        path.with_name(path.name + ".new").replace(path)

    def get_bytes(self, name): return (self.base / orchestrator.checked_name(name)).read_bytes()

    def list(self, prefix=""):
        found = (str(path.relative_to(self.base)) for path in self.base.rglob("*") if path.is_file())
        return iter(sorted(name for name in found if name.startswith(prefix)))

    def delete(self, name): (self.base / orchestrator.checked_name(name)).unlink(missing_ok=True)

    def stat(self, name):
        path = self.base / orchestrator.checked_name(name)
        return orchestrator.Stat(path.stat().st_size, path.stat().st_mtime) if path.is_file() else None


class Plain(orchestrator.Metric):
    """Registered by nobody."""

    def measure(self, features): return {}
'''
PIPELINE = """\
name: registered
store: shelf://here
elastic: {workers: 1, device: cpu}
data: {photos: {path: photos}}
stages:
  curate: {kind: curate, data: photos, clusters: 2, near_duplicate: 0}
  graded: {kind: graded, needs: curate}
  pretrain:
    kind: pretrain
    needs: curate
    model: vit_thin
    heads: {hidden: 16, dino_bottleneck: 8, dino_prototypes: 16, ibot_bottleneck: 8, ibot_prototypes: 16}
    steps: 2
    batch_size: 8
    block_size: 4
    crops: &crops {global_size: 32, local_size: 16, num_local: 1, augmentations: [inverted]}
    optimizer: &optimizer {lr: {peak: 1.0e-3}}
    objectives: [{use: length, weight: 0.1}]
  distill:
    kind: distill
    needs: curate
    features: {teachers: {edges: {module: edges, size: 32}}}
    students: {thin: {model: vit_thin}}
    steps: 2
    batch_size: 8
    block_size: 4
    crops: *crops
    optimizer: *optimizer
  evaluate: {kind: evaluate, needs: [curate, pretrain, distill], num_pictures: 1, num_snapshots: 1, metrics: [counted]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder outside the repository with the module, a pipeline file and photos."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "own.yaml").write_text(PIPELINE)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    return tmp_path


@pytest.fixture
def mine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, imported, with the folder as working directory."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    monkeypatch.setenv(installed.REGISTERED, "")
    installed.forget()
    yield importlib.import_module("mine")
    sys.modules.pop("mine", None)
    monkeypatch.undo()
    installed.forget()


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python outside the repository; it knows what this process has registered."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )


@pytest.mark.long
@pytest.mark.cluster
def test_a_run_uses_what_a_program_registers_in_all_its_processes(folder: Path, empty_database: Path) -> None:
    (folder / "runs").mkdir()
    shutil.copyfile(empty_database, folder / "runs" / "mlflow.db")
    program = (
        "import json, mine, orchestrator\n"
        "found = orchestrator.run('own.yaml', quiet=True)\n"
        "history = json.loads((found['pretrain'].folder() / 'history.json').read_text())\n"
        "print(json.dumps([{name: dict(one.summary) for name, one in found.items()}, history[0]['metrics']]))\n"
    )
    (folder / "program.py").write_text(program)
    done = python(folder, "program.py")
    assert done.returncode == 0, done.stdout + done.stderr
    summaries, metrics = json.loads(done.stdout.splitlines()[-1])
    assert summaries["graded"] == {"grade": 3.0}
    assert metrics["length"] > 0
    assert summaries["distill"]["images_forwarded"] == 16
    assert summaries["evaluate"]["counted_photos_thin"] == 12
    assert (folder / "shelf/artifacts").is_dir()


def test_names_are_in_files_schema_explanations_and_tables(mine: Any) -> None:
    loaded = load(Path("own.yaml"))
    assert type(loaded.spec.stages["graded"]) is mine.Graded
    assert "Grades photos." in str(schema())
    assert explain("graded.needs")
    assert "vit_thin" in {row["name"] for row in model_rows()}
    assert type(open_store("shelf://here")) is mine.Shelf


def test_processes_that_the_program_starts_know_the_names(mine: Any, folder: Path) -> None:
    code = (
        "from orchestrator import installed; from orchestrator.models.presets import preset\n"
        "print(preset('vit_thin').dim, installed.find('metrics', 'counted').__name__)"
    )
    done = python(folder, "-c", code)
    assert done.stdout == "24 Counted\n", done.stderr


def test_what_was_worked_out_before_is_worked_out_anew(mine: Any) -> None:
    assert "third_moment" not in str(schema())
    before = registry.every_stage()
    for _ in range(2):
        assert orchestrator.register_metric("third_moment")(mine.Plain) is mine.Plain
    assert "third_moment" in str(schema())
    assert registry.every_stage() is not before


def test_what_is_no_import_path_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(installed.REGISTERED, "models/odd=os models/odd2=:x models/fine=mine:THIN")
    assert presets.registered("models") == (("fine", "mine:THIN"),)
    for name in ("odd", "odd2"):
        with pytest.raises(ValueError, match=f"unknown model '{name}'"):
            presets.preset(name)


def test_a_name_with_two_paths_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(installed.REGISTERED, "metrics/twice=mine:Plain metrics/twice=mine:Other")
    installed.forget()
    try:
        with pytest.raises(UserError, match="a metric 'twice' already: mine:Other"):
            installed.register("metrics", "twice", "mine:Plain")
    finally:
        monkeypatch.setenv(installed.REGISTERED, "")
        installed.forget()


def test_a_name_is_registered_once_and_for_what_can_be_imported(mine: Any) -> None:
    class Local(orchestrator.Metric):
        """Of a function."""

    mistakes: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: orchestrator.register_metric("local")(Local), "other processes cannot import it"),
        (lambda: orchestrator.register_metric("counted")(mine.Plain), "a metric 'counted' already: mine:Counted"),
        (lambda: orchestrator.register_stage("curate")(mine.Graded), "'curate' is the name of one of our stages"),
        (lambda: orchestrator.register_model("vit_s", "mine:THIN"), "'vit_s' is the name of one of our models"),
        (lambda: orchestrator.register_model("thin", "mine"), "'mine' is not an import path"),
        (lambda: orchestrator.register_store("s3")(mine.Shelf), "'s3' is the name of one of our stores"),
        (lambda: orchestrator.register_metric("a b")(mine.Plain), "'a b' is not a usable name"),
    )  # fmt: skip
    for register, expected in mistakes:
        with pytest.raises(UserError, match=expected):
            register()
    assert installed.names("metrics") == ["counted"]
