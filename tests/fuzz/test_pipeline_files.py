"""Damaged copies of every pipeline file of the repository: each loads, or is one UserError, in bounded time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UserError
from orchestrator.pipeline.load import load

from .mutations import TEXTS, damaged_bytes, damaged_lines, damaged_values, in_time, sensible, some

CONF = Path(__file__).parents[2] / "conf"
# Those of clusters are not pipeline files, and whoever runs one by mistake gets a message, too.
FILES = {
    path.relative_to(CONF).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(CONF.rglob("*.yaml"))
}
VALUES = {name: next(iter(yaml.safe_load_all(text))) for name, text in FILES.items()}
KEYS = sorted({key for values in VALUES.values() if isinstance(values, dict) for key in values} | {"extends"})

YAML = st.recursive(
    TEXTS | st.sampled_from(["~", "1e3", "0x1f", "2024-01-01", "!!int x", "*a", "&a", "|", ">", "%", "@", "`", "? "]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
        st.lists(st.tuples(inner, inner), max_size=3).map(
            lambda parts: "{" + ", ".join(f"{key}: {value}" for key, value in parts) + "}"
        ),
        st.tuples(st.sampled_from(KEYS) | inner, inner).map(lambda pair: f"{pair[0]}: {pair[1]}"),
        st.lists(inner, max_size=4).map("\n".join),
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of conf/, in which files that extend each other are side by side."""
    folder = tmp_path_factory.mktemp("fuzz") / "conf"
    shutil.copytree(CONF, folder)
    return folder


def loads_or_refuses(path: Path, *overrides: str) -> None:
    with in_time():
        try:
            load(path, overrides, needs_data=False).resolved()
        except UserError as error:
            sensible(str(error))


def written(conf: Path, name: str, data: bytes) -> Path:
    path = conf / name
    path = path.with_name(f"damaged-{path.name}")
    path.write_bytes(data)
    return path


@some(40)
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_damaged_bytes(conf: Path, data: st.DataObject, name: str) -> None:
    loads_or_refuses(written(conf, name, data.draw(damaged_bytes(FILES[name].encode()))))


@some(40)
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_damaged_lines(conf: Path, data: st.DataObject, name: str) -> None:
    text = data.draw(damaged_lines(FILES[name]))
    loads_or_refuses(written(conf, name, text.encode("utf-8", "surrogatepass")))


@some(40)
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_other_values(conf: Path, data: st.DataObject, name: str) -> None:
    values: Any = data.draw(damaged_values(VALUES[name]))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    loads_or_refuses(written(conf, name, text.encode("utf-8", "surrogatepass")))


@some(60)
@given(text=YAML)
def test_any_yaml(conf: Path, text: str) -> None:
    loads_or_refuses(written(conf, "any.yaml", text.encode("utf-8", "surrogatepass")))


@some(30)
@given(key=st.sampled_from(KEYS), text=YAML)
def test_any_override(conf: Path, key: str, text: str) -> None:
    loads_or_refuses(conf / "full_pipeline.yaml", f"{key}={text}")
