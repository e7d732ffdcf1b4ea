"""Makes the toy stages importable and writes pipeline files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

Traces = Callable[[], list[str]]

PIPELINE = """\
name: toy
store: runs/
data:
  photos: {path: photos}
elastic: {workers: [1, 2]}
stages:
  curate: {kind: curate, data: photos}
  pretrain:
    kind: pretrain
    needs: curate
    optim: {lr: 0.2}
  evaluate: {kind: evaluate, needs: [pretrain, curate]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    return tmp_path


@pytest.fixture
def trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Names of the stages that really ran since the last call."""
    path = folder / "trace"
    monkeypatch.setenv("TOY_TRACE", str(path))

    def ran() -> list[str]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split()[0] for line in lines]

    return ran


@pytest.fixture
def write(folder: Path) -> Callable[[str], Path]:
    """Writes a pipeline file."""

    def write_text(text: str = PIPELINE) -> Path:
        path = folder / "toy.yaml"
        path.write_text(text)
        return Path("toy.yaml")

    return write_text


@pytest.fixture
def pipeline(write: Callable[[str], Path]) -> Path:
    """The path of the pipeline file that most tests use."""
    return write(PIPELINE)
