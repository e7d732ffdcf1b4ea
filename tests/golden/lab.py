"""The workers of tests/elastic, which can also run the cases of this folder; see tests/elastic/lab.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Run as a script, this file would hide the other one of its name.
sys.path[:] = [str(HERE.parent / "elastic"), *(path for path in sys.path if Path(path) != HERE), str(HERE)]

import cases  # noqa: E402
import lab  # noqa: E402


def prepare(spec: dict[str, Any]) -> str:
    """The fixed inputs of all cases, in `folder`."""
    cases.prepare(Path(spec["folder"]))
    return spec["folder"]


def golden(spec: dict[str, Any]) -> cases.Numbers:
    """The numbers of one case."""
    return cases.numbers(spec["case"], Path(spec["folder"]), Path(spec["scratch"]) / "stage")


if __name__ == "__main__":
    lab.prepare, lab.golden = prepare, golden  # type: ignore[attr-defined]
    lab.main()
