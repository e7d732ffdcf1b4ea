"""Every stage kind gives the numbers that are committed beside this file, or its `version` has to be raised.

Keys hold no hash of code (docs/adr/0007-keys.md), so this is what notices that a change of code changes results.
Once the version is raised, `GOLDEN=write python -m pytest tests/golden` writes the new numbers.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from orchestrator.stages import AnyStage
from orchestrator.stages.base import Stage

HERE = Path(__file__).parent
# What rounding makes of these runs on another processor lies below; what any mistake makes of them, far above.
TOLERANCE = 1e-4
_ABSOLUTE = 1e-7
_SHOWN = 4
# Case → kind.
CASES = {
    **{kind: kind for kind in ("curate", "pretrain", "gram_anchor", "high_res", "distill", "align_text")},
    "distill_features": "distill",
    "finetune": "finetune",
    "finetune_lora": "finetune",
    "evaluate": "evaluate",
    "publish": "publish",
}
KINDS: dict[str, type[Stage]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(AnyStage)[0])
}
Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Runs `do` in a worker forked from a process that has imported everything, with a cache of its own."""
    # Without Intel's library OpenCV rounds pixels alike on all processors.
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OPENCV_IPP": "disabled"}
    env["ORCHESTRATOR_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, str(HERE / "lab.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as forge:
        assert forge.stdin is not None
        assert forge.stdout is not None

        def answer(do: str, **spec: Any) -> Any:
            scratch = tmp_path_factory.mktemp(do)
            forge.stdin.write(json.dumps({"do": do, "world": 1, "scratch": str(scratch), **spec}) + "\n")
            forge.stdin.flush()
            codes = json.loads(forge.stdout.readline())
            assert codes == [0], (scratch / "log-0").read_text()[-4000:]
            return json.loads((scratch / "result-0").read_text())["result"]

        yield answer
        forge.stdin.close()


@pytest.fixture(scope="session")
def folder(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fixed inputs."""
    made: str = ask("prepare", folder=str(tmp_path_factory.mktemp("inputs")))
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_kind_computes_what_it_did(case: str, ask: Ask, folder: str) -> None:
    kind = CASES[case]
    path = HERE / f"{case}.json"
    found: dict[str, float] = ask("golden", case=case, folder=folder)
    known = json.loads(path.read_text()) if path.exists() else {"version": 0, "numbers": {}}
    changed = differences(known["numbers"], found)
    raised = KINDS[kind].version > known["version"]
    if os.environ.get("GOLDEN") == "write" and (raised or not changed):
        write(path, kind, found)
        return
    if changed and not raised:
        pytest.fail(message(kind, changed), pytrace=False)
    assert known["version"] == KINDS[kind].version, (
        f"the version of {kind} was raised: `GOLDEN=write python -m pytest tests/golden` writes its new numbers"
    )


def differences(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """The numbers that differ, a line each."""
    return [
        f"{name}: {old.get(name, 'none')} → {new.get(name, 'none')}"
        for name in [*old, *(name for name in new if name not in old)]
        if name not in old or name not in new or not close(name, old[name], new[name])
    ]


def close(name: str, old: float, new: float) -> bool:
    """Whether rounding may have made the difference."""
    if name.endswith("sample_order"):  # a hash
        return old == new
    if name.endswith("/direction"):  # of unit vectors
        return abs(old - new) <= TOLERANCE
    return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=_ABSOLUTE)


def message(kind: str, changed: list[str]) -> str:
    """What changed, and what to do."""
    stage = KINDS[kind]
    source = stage.__module__.removeprefix("orchestrator.").replace(".", "/") + ".py"
    lines = "\n  ".join(changed[:_SHOWN])
    more = f"\n  and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    return (
        f"the results of stage kind {kind!r} changed:\n  {lines}{more}\n"
        f"If that is meant, raise `version` of kind {kind!r} (class {stage.__name__} in {source}) from "
        f"{stage.version} to {stage.version + 1}, so that artifacts made before are not taken for today's; then write "
        "the new numbers with `GOLDEN=write python -m pytest tests/golden`."
    )


def write(path: Path, kind: str, found: dict[str, float]) -> None:
    """Keep the numbers, rounded to what is compared."""
    numbers = {name: float(f"{value:.10g}") for name, value in found.items()}
    record = {"kind": kind, "version": KINDS[kind].version, "numbers": numbers}
    path.write_text(json.dumps(record, indent=1) + "\n")


def test_numbers_are_written_only_for_a_version_that_was_raised(tmp_path: Path) -> None:
    said = message("pretrain", ["step 1/loss: 1.0 → 2.0"])
    assert "raise `version` of kind 'pretrain' (class Pretrain in stages/ssl/pretrain.py) from 2 to 3" in said
    assert differences({"a": 1.0, "b": 2.0}, {"a": 1.0 + 1e-6, "c": 3.0}) == [
        "b: 2.0 → none",
        "c: none → 3.0",
    ]
    assert differences({"step 1/sample_order": 1e9}, {"step 1/sample_order": 1e9 + 1}) != []


def test_every_kind_has_numbers() -> None:
    assert set(CASES.values()) == set(KINDS)
    assert {path.stem for path in HERE.glob("*.json")} == set(CASES)
