"""How far work is: counted by any number of threads, shown as bars on a terminal, as lines elsewhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from orchestrator import progress
from orchestrator.cli.image_progress import ImageProgress
from orchestrator.elastic.time_accounting import TimeAccounting
from orchestrator.pipeline.console import _Ticker, _ToConsole
from orchestrator.progress import BARS, Meter, Progress


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.reports: list[Progress] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = getattr(record, "progress", None)
        if found is None:
            self.lines.append(record.getMessage())
        else:
            self.reports.append(found)


@pytest.fixture
def kept() -> Iterator[_Kept]:
    handler, logger = _Kept(), logging.getLogger("orchestrator")
    before = logger.level
    # Not the attributes: logging remembers what each logger takes until a level is set.
    BARS.setLevel(logging.DEBUG)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)
    BARS.setLevel(logging.NOTSET)


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_the_time_left_is_that_of_the_work_left(kept: _Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    meter = Meter("curate", 400, "photos read")
    clock.now += 30
    meter.add(100)
    assert kept.reports == [Progress("curate", 100, 400, "photos read", 90.0)]
    assert kept.lines == ["curate: 100 of 400 photos read, 1m30s left"]
    clock.now += 0.1
    meter.add()
    assert len(kept.reports) == 1, "a bar is drawn a few times a second, not for each photo"
    meter.add(299)
    assert kept.reports[-1].done == 400, "but its end always is"


def test_no_photo_is_lost_between_threads(kept: _Kept) -> None:
    meter = Meter("curate", 2000, "photos read")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: meter.add(), range(2000)))
    assert kept.reports[-1].done == 2000


def test_bars_of_students_stand_below_each_other_without_the_stage() -> None:
    ticker = _Ticker("distill")
    ticker.show(Progress("distill/vit", 3, 20, "loss 11.2", 65.0))
    ticker.show(Progress("distill/convnext", 20, 20, "loss 9.8", 0.0))
    ticker.show(Progress("distill/vit", 4, 20, "loss 11.1", 61.0))
    output = io.StringIO()
    Console(file=output, width=100, color_system=None).print(ticker)
    _, first, second = output.getvalue().splitlines()
    assert first.split()[0] == "vit"
    assert first.rstrip().endswith("4/20 1m01s left · loss 11.1")
    assert second.split()[0] == "convnext"
    assert second.rstrip().endswith("20/20 loss 9.8")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_bar_in_the_place_of_the_line(terminal: bool) -> None:
    output = io.StringIO()
    ticker = _Ticker("pretrain")
    handler = _ToConsole(Console(file=output, width=100, force_terminal=terminal, color_system=None), ticker)
    step = {"levelno": logging.INFO, "msg": "pretrain: step 3/9", **progress.ROUTINE}
    handler.emit(logging.makeLogRecord(step))
    handler.emit(logging.makeLogRecord({"levelno": logging.DEBUG, "msg": "nobody's"}))
    assert output.getvalue() == ("" if terminal else "  · pretrain: step 3/9\n")
    assert ticker.message == ("" if terminal else "pretrain: step 3/9")


def test_the_account_names_what_happened_and_no_more() -> None:
    account = TimeAccounting(useful=33.3, startup=5.2, checkpoint=0.01)
    assert account.described() == "86% of 38.5 s trained; 5.2 s startup"
    account = TimeAccounting(
        useful=50, restart=4, lost=46, counts={"preemptions": 1, "steps_lost": 7, "restarts": 2}
    )
    assert account.described() == (
        "50% of 100.0 s trained; 4.0 s restarts, 46.0 s lost; 1 preemption, 7 lost steps"
    )


def test_what_an_earlier_run_has_done_says_nothing_of_how_fast_it_goes(
    kept: _Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock(monkeypatch)
    meter = Meter("curate", 400, "photos embedded")
    meter.begin_at(300)
    assert kept.reports == [Progress("curate", 300, 400, "photos embedded", None)]
    clock.now += 30
    meter.add(50)
    assert kept.reports[-1] == Progress("curate", 350, 400, "photos embedded", 30.0)
    assert kept.lines == ["curate: 350 of 400 photos embedded, 30s left"]


def test_a_resumed_command_tells_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, output = _Clock(monkeypatch), io.StringIO()
    with ImageProgress(Console(file=output, width=100)) as shown:
        clock.now += 4  # the model is loaded
        shown(900, 1000)
        assert output.getvalue() == ""
        clock.now += 10
        shown(920, 1000)
        assert output.getvalue().strip() == "embedding: 920 of 1,000 images, 2.0 images/s, 40s left"
        clock.now += 40
        shown(1000, 1000)
    assert shown.seconds == 50
