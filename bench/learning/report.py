"""The results as a file, and that file as the tables and the picture of `docs/learning.md`.

`python -m bench.learning.report` brings the document up to date.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench.learning.finding import Finding, spread

RESULTS = Path(__file__).parents[1] / "results" / "learning.json"
DOCUMENT = Path(__file__).parents[2] / "docs" / "learning.md"
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
_PICTURE = "learning.png"
_LINES = ("solid", "dashed", "dotted")


def write_result(path: Path, finding: Finding, date: str, wall_s: float | None) -> None:
    """Put an experiment into the results file; the others keep what they had, with its date.

    `wall_s` is its own time: what an earlier experiment of the same run trained already is not in it. None: nothing was
    trained, only scored anew, and the time of the training stays.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if wall_s is None:
        wall_s = known.get(finding.name, {}).get("wall_s", 0.0)
    known[finding.name] = {"date": date, "machine": _machine(), "wall_s": round(wall_s), **finding.as_json()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tables(results: Mapping[str, Any]) -> str:
    """Markdown: for each experiment its claims and its arms."""
    lines = []
    for name, finding in results.items():
        lines += [
            f"### {name}",
            "",
            f"{finding['date']}, {finding['machine']}, {finding['wall_s'] / 60:.0f} minutes.",
            "",
        ]
        lines += ["| claim | holds | figures |", "|---|---|---|"]
        for asked in finding["questions"]:
            lines.append(f"| {asked['claim']} | {_answer(asked)} |")
        lines += ["", "| arm | mean ± spread |", "|---|---|"]
        lines += [
            f"| {arm} | {one['mean']:.3f} ± {one['spread']:.3f} |" for arm, one in finding["arms"].items()
        ]
        lines += ["", *finding["notes"]] if finding["notes"] else []
        lines.append("")
    return "\n".join(lines)


def _answer(asked: Mapping[str, Any]) -> str:
    """The claim's two other cells. A claim that did not stand later keeps its figure and says why."""
    if asked.get("withdrawn"):
        return f"withdrawn | {asked['detail']}: {asked['withdrawn']}"
    return f"{'yes' if asked['holds'] else '**no**'} | {asked['detail']}"


def rewrite(document: str, results: Mapping[str, Any]) -> str:
    """The document with its measured part made anew."""
    before, rest = document.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n{tables(results)}\n{_END}{after}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The curves of all experiments that have some, a panel each."""
    from matplotlib.figure import Figure

    panels = [(name, finding["curves"]) for name, finding in results.items() if finding["curves"]]
    figure = Figure(figsize=(8, 3.6 * len(panels)), layout="constrained")
    for place, (name, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels), 1, place, title=name)
        # What is measured has a colour, how it came about a line: "food: before" and "food: after" belong together.
        measures = list(dict.fromkeys(label.partition(": ")[0] for label in curves))
        ways = list(dict.fromkeys(label.partition(": ")[2] for label in curves))
        for label, points in curves.items():
            measure, _, way = label.partition(": ")
            axes.errorbar(
                [int(point) for point in points],
                [mean(of_seeds) for of_seeds in points.values()],
                [spread(of_seeds) for of_seeds in points.values()],
                color=f"C{measures.index(measure)}",
                linestyle=_LINES[ways.index(way)],
                marker="o",
                markersize=3,
                capsize=2,
                label=label,
            )
        axes.set_xlabel("input size in pixels" if name == "highres" else "steps")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Rewrite the document and its picture."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, DOCUMENT.with_name(_PICTURE))


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
