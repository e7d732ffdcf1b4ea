"""What a storm's log adds up to: a table by kind of fault, the stages' goodput, what was checked."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from chaos.storm import Storm, Struck

_NUMBERS = re.compile(r"\b[0-9a-f]{8}\b(?:, [0-9a-f]{8}\b)*|\d+(?:\.\d+)?")
_LONGEST = 110


def table(struck: Sequence[Struck]) -> list[str]:
    """One row a kind, in Markdown."""
    kinds: dict[str, list[Struck]] = defaultdict(list)
    for one in struck:
        kinds[one.kind].append(one)
    lines = [
        "| fault | times | seconds to the next step: median (worst) | steps lost | what the engine said |",
        "|---|---|---|---|---|",
    ]
    for kind, ones in sorted(kinds.items()):
        seconds = sorted(one.next_step for one in ones if one.next_step is not None)
        took = f"{statistics.median(seconds):.1f} ({seconds[-1]:.1f})" if seconds else "—"
        lines.append(
            f"| {kind} | {len(ones)} | {took} | {sum(one.steps_lost for one in ones)} | {said(ones)} |"
        )
    return lines


def said(ones: Sequence[Struck]) -> str:
    """The causes that controllers gave in the wake of these faults, with their numbers blotted out."""
    causes = Counter(
        _NUMBERS.sub("…", recovery["cause"])[:_LONGEST].replace("|", "/")
        for one in ones
        for recovery in one.recoveries
    )
    return "; ".join(f"{cause} (×{count})" for cause, count in causes.most_common(3)) or "no group ended"


def goodput(accounts: dict[str, dict[str, Any]]) -> list[str]:
    """One row a job, in Markdown."""
    names = ("useful", "lost", "checkpoint", "restart", "waiting", "startup")
    lines = [f"| job | goodput | {' | '.join(f'{name} s' for name in names)} | restarts | steps lost |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for job, account in sorted(accounts.items()):
        total = sum(account[name] for name in names) or 1.0
        seconds = " | ".join(f"{account[name]:.0f}" for name in names)
        counts = account["counts"]
        row = f"| {job} | {account['useful'] / total:.2f} | {seconds} | {counts.get('restarts', 0)} "
        lines.append(f"{row}| {counts.get('steps_lost', 0)} |")
    return lines


def log(storm: Storm) -> list[str]:
    """One line a fault: when, at how many steps of all jobs, what, and what came of it."""
    lines = []
    for one in storm.struck:
        took = (
            f"{one.next_step:.1f} s to the next step"
            if one.next_step is not None
            else "no step came after it"
        )
        causes = "; ".join(recovery["cause"][:_LONGEST] for recovery in one.recoveries)
        lost = f", {one.steps_lost} steps lost" if one.steps_lost else ""
        line = f"{one.time - storm.began:7.1f} s  {one.steps:4}  {one.kind}: {one.what} → {took}{lost}"
        lines.append(f"    {line}{f' [{causes}]' if causes else ''}")
    return lines


def summary(storm: Storm, head: str, checked: Sequence[str], wrong: Sequence[str]) -> str:
    """The whole report, in Markdown."""
    minutes = (storm.ended - storm.began) / 60
    ends = [f"{code} ({words})" for code, words in storm.driver.own_ends]
    lines = [
        head,
        "",
        f"{len(storm.struck)} faults in {minutes:.1f} minutes; the driver was started {storm.driver.starts} times"
        + (f", and ended by itself with {', '.join(ends)}" if ends else ""),
        "",
        *table(storm.struck),
        "",
        "A fault that comes while another is being recovered from waits with it.",
        "",
        *goodput(storm.sight.accounts),
        "",
        *(f"- {line}" for line in checked),
        "",
        *([f"WRONG: {line}" for line in wrong] or ["Nothing is wrong."]),
        "",
        *log(storm),
    ]
    return "\n".join(lines) + "\n"
