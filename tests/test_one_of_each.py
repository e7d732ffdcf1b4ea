"""What there is one of stays one: other modules call it and do not do it themselves."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `models` stands alone and writes two files of its own.
WRITERS = {"orchestrator/fsio.py", "models/pretrained.py"}
# Calls of the standard library that write by way of another name, or hash a file: `orchestrator.fsio` does it for all.
OF_FSIO = {
    "os": {"replace", "rename", "renames", "link", "fsync", "fdatasync"},
    "shutil": {"move"},
    "tempfile": {"mkstemp", "NamedTemporaryFile"},
    "hashlib": {"file_digest"},
}
_NAMES = {"replace", "rename"}.union(*OF_FSIO.values())

# Where a write does not wait for the disk, on purpose: each says why beside it.
NOT_DURABLE = {
    "orchestrator/data/samples.py",
    "orchestrator/elastic/time_accounting.py",
    "orchestrator/pipeline/store/workspace.py",
    "orchestrator/teacher_service/counters.py",
    "orchestrator/storage/artifact_copy.py",
    "orchestrator/storage/bytes_store.py",
    "orchestrator/storage/local.py",
    "orchestrator/storage/s3.py",
    "orchestrator/tracking/backlog.py",
    "orchestrator/tracking/flusher.py",
    "orchestrator/training/handed_over.py",
    "stages/distill/checkpointed.py",
    "stages/evaluate/remembered.py",
}


def modules() -> dict[str, str]:
    """The text of each module, by its path."""
    paths = [
        path
        for folder in ("orchestrator", "models", "objectives", "stages")
        for path in (ROOT / folder).rglob("*.py")
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def own_writes(text: str) -> list[str]:
    """The calls in a module that are `orchestrator.fsio`'s to make."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module in OF_FSIO:
            found += [alias.name for alias in node.names if alias.name in OF_FSIO[node.module]]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if (name := node.func.attr) not in _NAMES:
                continue
            owner = ast.unparse(node.func.value)
            of_path = name in ("replace", "rename") and len(node.args) == 1  # str.replace has two
            if name in OF_FSIO.get(owner, ()) or (of_path and not node.keywords):
                found.append(f"{owner}.{name}")
    return found


def test_files_are_written_and_hashed_in_one_place() -> None:
    found = {path: own_writes(text) for path, text in modules().items()}
    assert {name for name, calls in found.items() if calls} == WRITERS, {
        name: calls for name, calls in found.items() if calls and name not in WRITERS
    }


def test_a_class_name_means_one_thing() -> None:
    homes = defaultdict(list)
    for path, text in modules().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path)
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_files_and_functions_are_short() -> None:
    """A file has at most 500 lines, a function at most 70: longer ones hold more than one idea."""
    files, functions = {}, {}
    for path, text in modules().items():
        if (count := text.count("\n")) > 500:
            files[path] = count
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (count := node.end_lineno - node.lineno + 1) > 70:
                    functions[f"{path}: {node.name}"] = count
    assert (files, functions) == ({}, {})


def test_each_write_is_on_the_disk_before_its_name_but_for_these() -> None:
    weak = {path: text.count("durable=False") for path, text in modules().items()}
    assert {path: count for path, count in weak.items() if count} == dict.fromkeys(NOT_DURABLE, 1)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("os.replace(a, b)", ["os.replace"]),
        ("draft.replace(path)", ["draft.replace"]),
        ("path.with_suffix('.x').rename(path)", ["path.with_suffix('.x').rename"]),
        ("from os import replace", ["replace"]),
        ("hashlib.file_digest(file, 'sha256')", ["hashlib.file_digest"]),
        ("text.replace('a', 'b')", []),
        ("dataclasses.replace(job, steps=1)", []),
        ("replace(job, steps=1)", []),
        ("tempfile.TemporaryDirectory()", []),
    ],
)
def test_what_counts_as_writing(text: str, calls: list[str]) -> None:
    assert own_writes(text) == calls
