"""It learns: pretraining, dense collapse and Gram anchoring, distillation, text and high resolution on real pictures.

Five experiments, several seeds each, of real stages on a local Ray cluster (`docs/learning.md`). The figure is how
many of their claims hold.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import Claim, stopwatch, summarize
from orchestrator.errors import UserError, nearest

if TYPE_CHECKING:
    from bench.learning.finding import Finding

EXPERIMENTS = ("pretrain", "collapse", "distill", "text", "highres")


def run(quick: bool, only: str = ",".join(EXPERIMENTS), seeds: int = 3, keep: Path | None = None) -> Claim:
    """Run the experiments; the full form of all of them writes `bench/results/learning.json`.

    Args:
        quick: tens of steps and one seed, which shows that everything works and nothing else.
        only: which experiments, separated by commas.
        seeds: how often each is repeated.
        keep: folder for what is trained; what is there already is not trained again.
    """
    from bench.learning.ground import Ground
    from bench.learning.lab import open_lab
    from bench.learning.report import RESULTS, write_result

    names = _chosen(only)
    findings: list[Finding] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        open_lab(keep or Path(temporary), range(1 if quick else seeds), quick, _say) as lab,
    ):
        ground = Ground(lab)
        for name in names:
            made = lab.made
            with stopwatch() as seconds:
                finding: Finding = importlib.import_module(f"bench.learning.{name}").run(ground)
            findings.append(finding)
            _say(f"{name}: {seconds():.0f} s")
            if not quick:
                trained = lab.made > made
                write_result(
                    RESULTS, finding, datetime.now(UTC).date().isoformat(), seconds() if trained else None
                )
    return _claim(findings)


def _claim(findings: Sequence[Finding]) -> Claim:
    questions = [question for finding in findings for question in finding.questions]
    return Claim(
        claim="what the parts of the recipe are for shows on real pictures",
        figure=sum(question.holds for question in questions),
        unit="claims that hold",
        goal=len(questions),
        limit=len(questions),
        arms={
            f"{finding.name}: {arm}": summarize(values)
            for finding in findings
            for arm, values in finding.arms.items()
        },
        notes=[f"{'✓' if q.holds else '✗'} {q.claim}: {q.detail}" for q in questions],
        better="more",
    )


def _chosen(only: str) -> list[str]:
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in EXPERIMENTS:
            close = nearest(name, EXPERIMENTS)
            hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(EXPERIMENTS)}"
            raise UserError(f"there is no experiment {name!r}", where="--only", hint=hint)
    return names


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
