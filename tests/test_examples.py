"""The package in examples/: installed, and run from outside the repository by its own notebook."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the package and this checkout on its path, and nothing of the checkout's folders."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(site), str(ROOT))),
        "ORCHESTRATOR_CACHE": str(folder / "cache"),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=560
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package; built from a copy, since a build leaves files beside its source."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(EXAMPLES, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run(
        [*command, "--target", str(folder / "site"), str(folder / "source")], check=True, timeout=120
    )
    return folder / "site"


@pytest.fixture(scope="module")
def ran(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the notebook ran, cell after cell in one namespace, and what it printed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(EXAMPLES / "pipeline.yaml", folder)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (folder / "notebook.py").write_text(code)
    done = python(site, folder, "notebook.py")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_each_thing_is_one_small_file() -> None:
    files = [path for path in (EXAMPLES / "field_kit").glob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in files} == {
        "augmentation", "metric", "model", "objective", "stage", "store", "student", "teacher",
    }  # fmt: skip
    for path in files:
        count = len(path.read_text().splitlines())
        assert count <= 40, f"{path.name} has {count} lines"


def test_the_notebook_runs_and_says_what_it_promises(ran: tuple[Path, str]) -> None:
    folder, said = ran
    assert "sharpness  sharpness  run" in said
    assert "(32, 48) nearest to 00.png" in said
    assert (folder / "runs/field-kit.db").is_file()
    assert not (folder / "runs/artifacts").exists(), "all artifacts are in the store"


def test_what_the_package_brings_took_part(ran: tuple[Path, str], site: Path) -> None:
    folder, _ = ran
    code = """
import json, orchestrator
found = orchestrator.run("pipeline.yaml", quiet=True)
table = json.loads((found["evaluate"].folder() / "table.json").read_text())
history = json.loads((found["pretrain"].folder() / "history.json").read_text())
model = json.loads((found["pretrain"].folder() / "model" / "config.json").read_text())
text = (found["evaluate"].folder() / "report.html").read_text()
print(json.dumps({
    "metrics": table["metrics"], "term": [row["metrics"]["variance"] for row in history],
    "overlap": model["config"]["overlap"], "report": "rank_uncentred" in text,
    "summary": dict(found["evaluate"].summary), "sharp": found["sharpness"].summary["sharpness"],
}))
"""
    done = python(site, folder, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["overlap"] == 4
    assert found["report"]
    assert found["sharp"] > 0
    assert len(found["term"]) == 4
    assert all(term > 0 for term in found["term"])
    assert set(found["metrics"]) == {"effective_rank", "rank_uncentred"}
    models = set(found["metrics"]["effective_rank"])
    assert models == {
        "random vit_stem", "pretrain, step 4", "student stem",
        "random field_kit.student:SmallCNN", "student cnn",
    }  # fmt: skip
    assert 1 <= found["summary"]["effective_rank_rank_stem"] <= 48
    assert "rank_uncentred_share_stem" in found["summary"]


def test_the_command_line_knows_the_package(ran: tuple[Path, str], site: Path) -> None:
    folder, _ = ran
    again = python(site, folder, "-m", "orchestrator", "plan", "pipeline.yaml")
    assert "Nothing to do: all 5 stages are up to date." in again.stdout, again.stdout + again.stderr
    schema = json.loads(python(site, folder, "-m", "orchestrator", "schema").stdout)
    text = json.dumps(schema)
    assert "Sharpness" in schema["$defs"]
    for name in ("effective_rank", "variance", "quarter_turn"):
        assert json.dumps({"const": name}) in text
    models = json.loads(python(site, folder, "-m", "orchestrator", "models", "--json").stdout)
    assert models[-1]["name"] == "vit_stem"
    explained = python(site, folder, "-m", "orchestrator", "explain", "sharpness.blurred_below")
    assert "below which a photo is blurred" in explained.stdout, explained.stdout + explained.stderr


def test_a_new_version_runs_what_uses_it(ran: tuple[Path, str], site: Path, tmp_path: Path) -> None:
    """A metric's version is part of the key of `evaluate`, and of nothing else."""
    folder, _ = ran
    newer = tmp_path / "site"
    shutil.copytree(site, newer)
    metric = newer / "field_kit/metric.py"
    metric.write_text(metric.read_text().replace("    centre: bool", "    version = 2\n    centre: bool"))
    code = "import orchestrator; print({n: s.action for n, s in orchestrator.plan('pipeline.yaml').items()})"
    done = python(newer, folder, "-c", code)
    assert "'distill': 'cached', 'evaluate': 'run'" in done.stdout, done.stdout + done.stderr
