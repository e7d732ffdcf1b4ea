"""Files that come with the photographs or from elsewhere: captions, pictures, and traces of spot machines."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from orchestrator.config.schema import DataSource
from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.sources.scan import scan
from orchestrator.errors import UserError
from orchestrator.simulation.costs import read_costs
from orchestrator.simulation.trace_file import read_trace
from tools import synthetic

from .mutations import TEXTS, damaged_bytes, damaged_lines, damaged_values, in_time, sensible, some

CONF = Path(__file__).parents[2] / "conf"
Write = Callable[[str, bytes], Path]

# --- captions ---------------------------------------------------------------------------------------------------

CAPTIONS = 'file,caption,label\na.png,"Rice, boiled",rice\nsub/b.png,Bread,\n'


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def reads_or_refuses(photos: Path, captions: bytes) -> None:
    path = photos / "captions.csv"
    path.write_bytes(captions)
    with in_time():
        try:
            found = scan(DataSource(path=photos, captions=path), "photos")
        except UserError as error:
            sensible(str(error))
            return
    assert [photo.path for photo in found] == ["a.png", "sub/b.png"]
    for photo in found:
        for text in (photo.caption, photo.label):
            assert text is None or (isinstance(text, str) and text.encode() is not None)


@some(60)
@given(data=damaged_bytes(CAPTIONS.encode()))
def test_captions_with_damaged_bytes(photos: Path, data: bytes) -> None:
    reads_or_refuses(photos, data)


@some(60)
@given(
    rows=st.lists(
        st.lists(TEXTS | st.sampled_from(["file", "caption", "label", "a.png"]), max_size=4), max_size=4
    ),
    cell=st.sampled_from([",", ";", "\t", '","', '"']),
    line=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
@example(rows=[["file", "file"], ["a.png", "b"]], cell=",", line="\n", encoding="utf-8")
@example(rows=[["file", "x" * 200_000], ["a.png", "b"]], cell=",", line="\n", encoding="utf-8")
def test_any_table_of_captions(
    photos: Path, rows: list[list[str]], cell: str, line: str, encoding: str
) -> None:
    text = line.join(cell.join(row) for row in rows)
    errors = "replace" if encoding == "latin-1" else "surrogatepass"
    reads_or_refuses(
        photos, text.encode(encoding.replace("-sig", "") if encoding == "utf-8-sig" else encoding, errors)
    )


# --- pictures ---------------------------------------------------------------------------------------------------

KINDS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def picture(kind: str) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in KINDS}


@some(120)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_damaged_pictures(write: Write, data: st.DataObject, kind: str) -> None:
    path = write(f"damaged{KINDS[kind]}", data.draw(damaged_bytes(PICTURES[kind])))
    with in_time():
        try:
            pixels = read_rgb(path)
        except UnreadableImage as error:
            sensible(error.reason)
            return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3


# --- traces and costs -------------------------------------------------------------------------------------------

TRACES = {path.name: path.read_text() for path in sorted((CONF / "traces").glob("*.json"))}
TRACE: dict[str, Any] = {
    "format": "orchestrator-trace", "version": 1, "name": "t", "zone": "z", "notes": "", "unit_s": 60, "duration": 9,
    "nodes": {"a": {"type": "gpu", "slots": 8, "price": [[0, 2.0], [30, 4.0]]}},
    "pools": {"p": {"count": 3, "price": 0.5}},
    "events": [
        {"at": 0, "node": "a", "event": "up"}, {"at": 0, "pool": "p", "event": "up", "count": 2},
        {"at": 1, "pool": "p", "event": "notice", "deadline": 2}, {"at": 5, "pool": "p", "event": "down", "count": 1},
    ],
}  # fmt: skip
SKYPILOT = {"metadata": {"gap_seconds": 600}, "data": [0, 2, 3, 1]}


def trace_or_message(path: Path) -> None:
    with in_time():
        try:
            trace = read_trace(path)
            assert len(trace.machines) < 10**6
            if all(len(machine.prices) == 1 for machine in trace.machines):
                json.dumps(synthetic.as_dict(trace), allow_nan=False)
        except UserError as error:
            sensible(str(error))


@some(60)
@given(data=st.data(), name=st.sampled_from(sorted(TRACES)))
def test_traces_with_damaged_bytes(write: Write, data: st.DataObject, name: str) -> None:
    short = TRACES[name][:3000]
    text = data.draw(st.sampled_from([short, json.dumps(TRACE, indent="\t"), json.dumps(SKYPILOT)]))
    trace_or_message(write("trace.json", data.draw(damaged_bytes(text.encode()))))


@some(60)
@given(text=damaged_lines(json.dumps(TRACE, indent=1)))
def test_traces_with_damaged_lines(write: Write, text: str) -> None:
    trace_or_message(write("trace.json", text.encode("utf-8", "surrogatepass")))


@some(150)
@given(value=damaged_values(TRACE) | damaged_values(SKYPILOT), indent=st.sampled_from([None, 1, "\t"]))
def test_traces_with_other_values(write: Write, value: Any, indent: Any) -> None:
    trace_or_message(write("trace.json", json.dumps(value, indent=indent).encode()))


COSTS = {
    "format": "orchestrator-costs", "version": 1, "source": "a run", "default": {"block_s": 0.5, "warm_s": 3},
    "stages": {"pretrain": {"measured_step_s": {"1": 2.0, "2": 1.1}}, "distill/vit-nano": {"stall_s": 0.1}},
}  # fmt: skip


@some(80)
@given(value=damaged_values(COSTS), indent=st.sampled_from([None, 1, "\t"]))
def test_costs_with_other_values(write: Write, value: Any, indent: Any) -> None:
    path = write("costs.json", json.dumps(value, indent=indent).encode())
    with in_time():
        try:
            costs = read_costs(path, ["pretrain", "distill"])
            for name in ("pretrain", "distill/vit-nano", "other"):
                assert costs.of(name).step(4, 2) < float("inf")
        except UserError as error:
            sensible(str(error))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": ' + "[" * 100_000,
        '{"format": "orchestrator-trace", "x": ' + "9" * 5000 + "}",
        '{"format": "orchestrator-trace",\n\t"version": 2}',
        '{"format": "orchestrator-trace", "version": 2, "\\ud800": 1}',
        json.dumps(TRACE | {"pools": {"p": {"count": 10**12}}}),
        json.dumps(TRACE | {"unit_s": 1e308}),
        json.dumps({"metadata": {"gap_seconds": 10**400}, "data": [1]}),
        json.dumps({"metadata": {"gap_seconds": 1e308}, "data": [1] * 30}),
        json.dumps({"metadata": {"gap_seconds": 60}, "data": [10**12]}),
        json.dumps({"metadata": {"gap_seconds": 60}, "data": [2**70, 0]}),
        json.dumps({"metadata": {"gap_seconds": 60}, "data": [0, 20_000] * 30}),
        json.dumps(TRACE | {"nodes": {"a": {"price": [[], [30, 4.0]]}}}),
    ],
    ids=range(13),
)
def test_what_was_found_in_traces_is_one_message(write: Write, text: str) -> None:
    path = write("trace.json", text.encode())
    with in_time(), pytest.raises(UserError) as raised:
        read_trace(path)
    sensible(str(raised.value))
