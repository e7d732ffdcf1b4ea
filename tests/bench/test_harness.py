"""The bench framework: order of arms, medians, calibration, fairness, and what `python -m bench` prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import harness  # noqa: E402
from bench.harness import Arm, Claim  # noqa: E402
from orchestrator.errors import UserError  # noqa: E402

FAKE = '''"""Fake things are fast."""
import atexit
from bench.harness import Claim, interleave

def run(quick):
    atexit.register(lambda: print("said at the end"))
    arms = interleave({"ours": lambda: 1.0, "theirs": lambda: 2.0}, 3)
    return Claim("fakes", arms["ours"].median, "s", 0.5, None, arms, calibration={"gemm_gflops": 1.0})
'''


def test_arms_take_turns_and_the_order_rotates() -> None:
    said: list[str] = []

    def arm(name: str, value: float) -> float:
        said.append(name)
        return value + len(said)

    arms = {name: (lambda name=name: arm(name, 0.0)) for name in "abc"}
    measured = harness.interleave(arms, 3)
    assert "".join(said) == "abcbcacab"
    # a was called 1st, 6th and 8th
    assert (measured["a"].median, measured["a"].low, measured["a"].high, measured["a"].n) == (6, 1, 8, 3)


def test_an_arm_needs_a_repetition() -> None:
    with pytest.raises(ValueError, match="without a repetition"):
        harness.interleave({"a": lambda: 1.0}, 0)


@pytest.mark.heavy
def test_cpu_time_counts_children_that_run_and_that_ended() -> None:
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    before = harness.cpu_seconds()
    subprocess.run([sys.executable, "-c", busy], check=True)
    ended = harness.cpu_seconds()
    assert ended - before >= 0.3
    running = subprocess.Popen(
        [sys.executable, "-c", busy + "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert running.stdout is not None
    running.stdout.readline()
    assert harness.cpu_seconds() - ended >= 0.3
    running.communicate(b"\n")


def test_stopwatch_stops() -> None:
    with harness.stopwatch() as seconds:
        time.sleep(0.02)
    first = seconds()
    time.sleep(0.02)
    assert seconds() == first >= 0.02


def test_calibration_is_that_of_this_machine() -> None:
    figures = harness.calibrate(1)
    assert set(figures) == {"gemm_gflops", "copy_gibs", "threads", "cores"}
    # No machine that runs this is slower than a tenth of a core of 2005, none faster than 10 PFLOP/s.
    assert 0.1 < figures["gemm_gflops"] < 1e7
    assert 0.01 < figures["copy_gibs"] < 1e5


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.0001], None),
        ([1.0, 2.001], "at step 1 the loss of ours is 2.001"),
        ([1.0, math.nan], "at step 1"),
        ([1.0], "ours took 1 steps and theirs 2"),
    ],
)
def test_unequal_losses_stop_a_comparison(losses: list[float], message: str | None) -> None:
    both = {"theirs": [1.0, 2.0], "ours": losses}
    if message is None:
        harness.require_same_losses(both)
    else:
        with pytest.raises(harness.UnfairError, match=message):
            harness.require_same_losses(both)


def test_met_follows_the_direction() -> None:
    arms = {"a": Arm(1, 1, 1, 1)}
    assert Claim("c", 2.0, "s", 2.0, None, arms).met is True
    assert Claim("c", 2.1, "s", 2.0, None, arms).met is False
    assert Claim("c", 2.1, "x", 2.0, None, arms, better="more").met is True
    assert Claim("c", 2.1, "x", None, None, arms).met is None
    assert Claim("c", math.nan, "x", 1.0, None, arms).met is False


def test_json_has_no_infinities() -> None:
    line = harness.as_json(Claim("c", math.inf, "s", None, None, {"a": Arm(math.nan, 1, 1, 1)}), quick=True)
    data = json.loads(line)
    assert data["figure"] is None
    assert data["arms"]["a"]["median"] is None
    assert data["quick"] is True


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench` in a copy of the framework with one fake claim."""
    package = folder / "bench"
    package.mkdir(exist_ok=True)
    for name in ("__init__.py", "__main__.py", "harness.py"):
        (package / name).write_text((ROOT / "bench" / name).read_text())
    (package / "fake.py").write_text(FAKE)
    (package / "_helper.py").write_text("X = 1\n")
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.heavy
def test_last_line_is_the_claim_and_a_missed_goal_exits_with_0(tmp_path: Path) -> None:
    done = bench(tmp_path, "fake", "--quick")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["claim"] == "fakes"
    assert (data["figure"], data["unit"], data["goal"], data["limit"], data["met"]) == (
        1.0,
        "s",
        0.5,
        None,
        False,
    )
    assert data["arms"]["theirs"]["median"] == 2.0
    assert data["arms"]["ours"]["n"] == 3
    assert data["calibration"] == {"gemm_gflops": 1.0}
    assert data["wall_s"] > 0
    assert "theirs" in done.stdout.splitlines()[5]
    assert "said at the end" in done.stderr


@pytest.mark.heavy
def test_lists_claims_and_finds_the_nearest_name(tmp_path: Path) -> None:
    listed = bench(tmp_path)
    assert listed.stdout.split() == ["fake", "Fake", "things", "are", "fast."]
    wrong = bench(tmp_path, "fkae")
    assert wrong.returncode == 2
    assert "did you mean 'fake'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_calibrates_before_and_after_a_claim_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(
        [{"gemm_gflops": 1.0, "copy_gibs": 2.0, "cores": 2.0}, {"gemm_gflops": 3.0, "copy_gibs": 4.0}]
    )
    monkeypatch.setattr(command, "calibrate", lambda: next(readings))
    monkeypatch.setattr(command, "claims", lambda folder: {"fake": ""})
    claim = Claim("c", 1.0, "s", None, None, {})
    monkeypatch.setitem(sys.modules, "bench.fake", SimpleNamespace(run=lambda quick: claim))  # type: ignore[arg-type]
    measured = command.measure("fake", quick=True).calibration
    assert measured == {
        "gemm_gflops": 1.0,
        "copy_gibs": 2.0,
        "cores": 2.0,
        "gemm_gflops_after": 3.0,
        "copy_gibs_after": 4.0,
    }


def test_unknown_claim_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no claim 'nothing-like-it'"):
        command.measure("nothing-like-it", quick=True)


def test_every_claim_of_the_project_says_what_it_claims() -> None:
    for name, line in command.claims(ROOT / "bench").items():
        assert line.endswith("."), f"bench/{name}.py: the docstring's first line is the claim, one sentence"
