"""Tables on narrow terminals: whole columns go, and no cell is cut."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from orchestrator.pipeline.console import Reporter, mark
from orchestrator.table import Rows

WHY = "config.optimizer.lr.peak: 0.002 → 0.004"


def printed(width: int) -> str:
    output = io.StringIO()
    table = Rows(("stage", "kind", "needs", "action", "why"), expendable=("needs", "kind"))
    table.add("align_text", "align_text", "curate, distill, a_long_name", mark("cached"), WHY)
    table.add("evaluate", "evaluate", "align_text", mark("run"), f"{WHY}\nnever [ran]")
    table.print(Console(file=output, width=width))
    return output.getvalue()


@pytest.mark.parametrize(
    ("width", "gone"),
    [(140, []), (80, ["needs"]), (62, ["needs", "kind"]), (58, ["needs", "kind"])],
)
def test_columns_go_one_by_one_where_there_is_no_room(width: int, gone: list[str]) -> None:
    text = printed(width)
    heading = text.splitlines()[0].split()
    assert heading == [name for name in ("stage", "kind", "needs", "action", "why") if name not in gone]
    assert (f"A wider terminal also shows: {', '.join(gone)}." in text) == bool(gone)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [140, 100, 80, 62])
def test_no_cell_is_cut_and_reasons_keep_their_brackets(width: int) -> None:
    text = printed(width)
    for cell in ("align_text", "✓ cached", "▶ run", "never [ran]"):
        assert cell in text


def test_what_a_run_took_counts_from_the_command_on() -> None:
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=200), since=time.monotonic() - 100)
    plans = [SimpleNamespace(name="curate", stage=SimpleNamespace(key="0" * 64))]
    reporter.begin(plans)  # type: ignore[arg-type]
    reporter.finished(plans, None, 0)  # type: ignore[arg-type]
    assert "Done in 1m4" in output.getvalue()


def test_an_empty_column_goes_first_and_is_not_missed() -> None:
    output = io.StringIO()
    table = Rows(("run", "state", "workers", "failed ranks, newest first"), expendable=("workers",))
    table.add("food-dinov3/distill/convnext-mini", "FINISHED", "1-2", "")
    table.print(Console(file=output, width=60))
    assert output.getvalue().splitlines()[0].split() == ["run", "state", "workers"]
    assert "FINISHED" in output.getvalue()
    assert "wider" not in output.getvalue()
