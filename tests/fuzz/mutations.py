"""Damaged copies of good input: bytes, lines, and values of JSON and YAML."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Half a minute for what takes milliseconds: a busy machine must not fail a test, an input that blows up must.
PATIENCE_S = 30.0

NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 2**64, 10**12, 10**30, -(10**30), 1e308, 5e-324, 0.5, -0.0]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", ".", "..", "../x", "\0", "\ud800", "\x1b[31m", "x" * 5000, "é" * 200, "a/b", "1", "null"]),
)  # fmt: skip
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with up to four faults: cut off, bits flipped, a part lost, doubled or overwritten."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(1, 40))
        match draw(st.sampled_from(["cut", "flip", "lose", "double", "overwrite", "insert"])):
            case "cut":
                del data[at:]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "lose":
                del data[at : at + size]
            case "double":
                data[at:at] = data[at : at + size]
            case "overwrite":
                data[at : at + size] = bytes(size)
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@st.composite
def damaged_lines(draw: st.DrawFn, whole: str) -> str:
    """`whole` with up to four lines lost, doubled, moved, indented otherwise, or with another text in them."""
    lines = whole.split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["lose", "double", "move", "indent", "add", "odd"])):
            case "lose" if len(lines) > 1:
                del lines[at]
            case "double":
                lines.insert(at, lines[at])
            case "move":
                lines.insert(draw(st.integers(0, len(lines) - 1)), lines.pop(at))
            case "indent":
                lines[at] = draw(st.sampled_from([" ", "  ", "\t", "- "])) + lines[at]
            case "add":
                lines[at] += draw(
                    st.sampled_from([":", " {", " [", ' "', " &a", " *a", " !!x", " #", " |", "\0", "\r"])
                )
            case _:
                lines[at] = draw(TEXTS)
    return "\n".join(lines)


@st.composite
def damaged_values(draw: st.DrawFn, whole: Any) -> Any:
    """A copy of JSON-like `whole` with up to three values replaced, removed or added."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in paths_in(data) if path]
        if not paths:
            return draw(VALUES)
        *parents, last = draw(st.sampled_from(paths))
        inside = data
        for part in parents:
            inside = inside[part]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                inside[last] = draw(VALUES)
            case "remove":
                del inside[last]
            case _ if isinstance(inside, dict):
                inside[draw(TEXTS)] = draw(VALUES)
            case _:
                inside.insert(last, draw(VALUES))
    return data


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in it, its own first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """What is inside must not take long, whatever it is given."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < PATIENCE_S, f"took {took:.0f} s"


def sensible(message: str) -> None:
    """A message that a terminal can show: not empty, not endless, and text."""
    assert message.strip()
    assert len(message) < 40_000
    message.encode()
    assert all(line.isprintable() for line in message.splitlines()), repr(message)


def some(short: int) -> settings:
    """How many examples a target tries: `short` in `make test`, as many as `make fuzz` says there."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", short)),
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )
