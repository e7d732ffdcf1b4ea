"""What is installed is what the repository shows, under names that a user's own folders cannot shadow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grimp
import pytest
from mypy.modulefinder import FindModuleCache, SearchPaths
from mypy.options import Options
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("models", "objectives", "stages")
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "sklearn", "matplotlib")


def source_modules() -> set[str]:
    """Every .py file of the package as a posix path, the linked folders followed."""
    walk = os.walk(ROOT / "orchestrator", followlinks=True)
    found = [Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".py")]
    return {path.relative_to(ROOT).as_posix() for path in found}


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree: a build in place would leave (and reuse) a build/ folder."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("orchestrator", *LINKED):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder)], cwd=tree, check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder to put on the path that holds what the wheel would install, and nothing else."""
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.mark.heavy
def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    assert packed == source_modules()
    assert {f"orchestrator/{name}/__init__.py" for name in LINKED} <= packed


@pytest.mark.heavy
def test_wheel_is_marked_as_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "orchestrator/py.typed" in archive.namelist()


def test_import_linter_sees_linked_packages() -> None:
    graph = grimp.build_graph("orchestrator", cache_dir=None)
    assert {dotted(path) for path in source_modules()} <= graph.modules


def test_type_checker_sees_linked_packages() -> None:
    paths = SearchPaths(python_path=(str(ROOT),), mypy_path=(), package_path=(), typeshed_path=())
    sources = FindModuleCache(paths, None, Options()).find_modules_recursive("orchestrator")
    assert {dotted(path) for path in source_modules()} == {source.module for source in sources}


USER_SCRIPT = """
import json
import ray

def seen():
    import importlib.util, models, stages
    names = ("orchestrator.models", "orchestrator.objectives", "orchestrator.stages")
    return {
        "user": [models.OWNER, stages.OWNER],
        "ours": [importlib.util.find_spec(name).origin for name in names],
        "plain": importlib.util.find_spec("objectives") is not None,
    }

driver = seen()
options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 * 2**20}
ray.init(address="local", num_cpus=1, **options)
print(json.dumps({"driver": driver, "worker": ray.get(ray.remote(seen).remote())}))
"""


@pytest.mark.cluster
def test_a_users_own_models_and_stages_live_beside_ours(installed: Path, tmp_path: Path) -> None:
    for name in ("models", "stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'user'\n")
    (tmp_path / "main.py").write_text(USER_SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "main.py"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ours = [str(installed / "orchestrator" / name / "__init__.py") for name in LINKED]
    expected = {"user": ["user", "user"], "ours": ours, "plain": False}
    assert json.loads(result.stdout.splitlines()[-1]) == {"driver": expected, "worker": expected}


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, orchestrator.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def pins(name: str) -> dict[str, str]:
    """Package → version of a lock file."""
    found = re.findall(r"^([a-z0-9.-]+)==([^ ;\n]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize(("lock", "extras"), [("requirements.lock", []), ("requirements-dev.lock", ["dev"])])
def test_lock_satisfies_pyproject(lock: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = sum((optional[extra] for extra in extras), project["dependencies"])
    locked = pins(lock)
    for requirement in map(Requirement, wanted):
        pin = locked.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{lock} lacks {requirement.name}: run make lock"
        assert requirement.specifier.contains(pin), f"{lock} has {pin}, not {requirement}: run make lock"


def test_locks_agree_and_leave_the_build_of_torch_open() -> None:
    runtime, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert runtime.items() <= dev.items()
    assert "+" not in runtime["torch"]
    assert not [name for name in dev if name.startswith(("nvidia-", "cuda-", "triton"))]
