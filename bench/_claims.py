"""Findings of benches that compare models: as a claim, and as tables in a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import Claim, summarize

if TYPE_CHECKING:
    from bench.learning.finding import Finding


def of_finding(finding: Finding, claim: str) -> Claim:
    """The claim whose figure is how many of the finding's questions hold."""
    return Claim(
        claim=claim,
        figure=sum(question.holds for question in finding.questions),
        unit="claims that hold",
        goal=len(finding.questions),
        limit=len(finding.questions),
        arms={arm: summarize(values) for arm, values in finding.arms.items()},
        notes=[f"{'✓' if q.holds else '✗'} {q.claim}: {q.detail}" for q in finding.questions],
        better="more",
    )


def write_table(results: Path, document: Path, name: str, begin: str, end: str, *, scope: str = "") -> None:
    """Put the table of the result `name` into a document, between two marks.

    Args:
        results: the JSON file of findings by name.
        document: has both marks; what is between them is replaced.
        scope: what the minutes are of, such as "for all seeds".
    """
    found = json.loads(results.read_text(encoding="utf-8"))[name]
    before, rest = document.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}\n{table(found, scope)}\n{end}{after}", encoding="utf-8")


def table(found: Mapping[str, Any], scope: str = "") -> str:
    """Markdown: a row for each model, a column for each way of asking; then the claims.

    Args:
        found: a finding as JSON, whose arms are named "column: row".
        scope: what the minutes are of.
    """
    columns = list(dict.fromkeys(arm.partition(": ")[0] for arm in found["arms"]))
    rows = list(dict.fromkeys(arm.partition(": ")[2] for arm in found["arms"]))
    minutes = f"{found['wall_s'] / 60:.0f} minutes {scope}".rstrip()
    lines = [f"{found['date']}, {found['machine']}, {minutes}.", ""]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [found["arms"][f"{column}: {row}"] for column in columns]
        shown = [
            f"{cell['mean']:.3f}" + (f" ± {cell['spread']:.3f}" if len(cell["values"]) > 1 else "")
            for cell in cells
        ]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    lines += ["", "| claim | holds | figures |", "|---|---|---|"]
    lines += [
        f"| {asked['claim']} | {'yes' if asked['holds'] else '**no**'} | {asked['detail']} |"
        for asked in found["questions"]
    ]
    return "\n".join(lines) + "\n"
