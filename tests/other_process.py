"""Many small programs in one other process: an interpreter takes longer to start than most of them take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

_RUN = """
import json, signal, sys, traceback
signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends also what never comes back to Python
seconds, programs = json.load(sys.stdin)
for name, program in programs.items():
    signal.alarm(seconds)
    try:
        exec(program, {})
    except Exception:
        said = traceback.format_exc()
    else:
        said = ""
    signal.alarm(0)
    print(json.dumps([name, said]), flush=True)
"""


def said_by(programs: Mapping[str, str], seconds: int) -> dict[str, str]:
    """What each program ended with: nothing, its traceback, or that it did not end in time.

    Args:
        programs: Python, by name; each has its own names.
        seconds: after which one is killed.
    """
    said: dict[str, str] = {}
    while left := {name: program for name, program in programs.items() if name not in said}:
        done = subprocess.run(
            [sys.executable, "-c", _RUN],
            input=json.dumps([seconds, left]),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        said |= dict(json.loads(line) for line in done.stdout.splitlines())
        killed = next((name for name in left if name not in said), None)
        if killed is not None:
            said[killed] = f"it did not end within {seconds} s (exit code {done.returncode})"
    return said
