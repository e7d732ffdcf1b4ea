"""Time a round over the number of students: a straight line whose slope is what one student costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Line:
    """Least squares: seconds = intercept + slope · students."""

    intercept: float
    slope: float
    r2: float


def line_of(seconds: Mapping[int, float]) -> Line:
    """The line through the points."""
    sizes, values = np.array(list(seconds)), np.array(list(seconds.values()))
    slope, intercept = np.polyfit(sizes, values, 1)
    rest = float(((values - intercept - slope * sizes) ** 2).sum())
    whole = float(((values - values.mean()) ** 2).sum())
    return Line(float(intercept), float(slope), 1 - rest / whole if whole else 1.0)


def plot(seconds: Mapping[int, float], line: Line, student_s: Mapping[int, float], path: Path) -> None:
    """The points, the line, and what as many services with one student each would take.

    Args:
        seconds: of a round by number of students.
        line: through them.
        student_s: what the process of one of so many students takes for itself.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    sizes = np.array(sorted(seconds))
    axes.plot(sizes, sizes * seconds[1], "--", color="0.6", label="as many services of one student")
    axes.plot(
        sizes,
        line.intercept + line.slope * sizes,
        color="C0",
        label=f"{line.intercept:.2f} + {line.slope:.2f} n",
    )
    axes.plot(sizes, [seconds[size] for size in sizes], "o", color="C0", label="measured, one teacher")
    axes.set_xlabel("students")
    axes.set_ylabel("processor seconds for one step of all")
    axes.set_title(
        f"A student more: slope {line.slope:.2f} s; its own process takes {min(student_s.values()):.2f} s "
        f"to {max(student_s.values()):.2f} s",
        fontsize=10,
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
