"""`make fuzz`: rounds of all targets with new examples, until the time is up or one of them fails."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
_FIRST, _MOST = 100, 5000


def main() -> int:
    """Pytest's exit status of the round that failed, or 0."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=28.0, help="about how long to look")
    until = time.monotonic() + 60 * parser.parse_args().minutes
    examples, round_number, took = _FIRST, 0, 0.0
    # A round takes as long as its examples; the last one is to end about in time.
    while (left := until - time.monotonic()) > took / 2 or round_number == 0:
        round_number += 1
        seed, began = secrets.randbelow(2**32), time.monotonic()
        _say(f"round {round_number}: {examples} examples a target, seed {seed}, {left / 60:.1f} minutes left")
        if status := _round(examples, seed):
            return status
        took = time.monotonic() - began
        if took < (until - time.monotonic()) / 4:
            examples, took = min(2 * examples, _MOST), 2 * took
    _say(f"nothing found in {round_number} rounds")
    return 0


def _round(examples: int, seed: int) -> int:
    # Whatever fails is kept in .hypothesis and comes first the next time.
    settings = {"HYPOTHESIS_PROFILE": "fuzz", "FUZZ_EXAMPLES": str(examples)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--timeout=0",
        f"--hypothesis-seed={seed}",
        str(FOLDER),
    ]
    return subprocess.run(
        command, env={**os.environ, **settings}, cwd=FOLDER.parents[1], check=False
    ).returncode


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
