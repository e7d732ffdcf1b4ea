"""The step of processes that share cores, against the sums over every set of others that may be ready."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sharing.contention import AROUND_CORES, Busy, contended_s, least_s

parts_of = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(Busy, st.integers(1, 40).map(lambda tenths: tenths / 10), st.integers(1, 3)),
    min_size=1,
)
CORES = st.sampled_from([1.0, 1.5, 2.0, 3.0, 8.0])


@given(parts_of, CORES)
def test_never_less_than_the_largest_part_or_all_work_over_all_cores(
    parts: dict[str, Busy], cores: float
) -> None:
    work_s = sum(part.seconds * part.processes for part in parts.values())
    assert contended_s(parts, cores) >= max(max(part.seconds for part in parts.values()), work_s / cores)


@given(parts_of)
def test_where_there_is_a_core_for_everybody_nobody_waits(parts: dict[str, Busy]) -> None:
    cores = sum(part.processes for part in parts.values()) + 1.0
    assert contended_s(parts, cores) == pytest.approx(max(part.seconds for part in parts.values()))


@given(parts_of, CORES)
def test_more_cores_are_never_slower(parts: dict[str, Busy], cores: float) -> None:
    assert contended_s(parts, cores + 1) <= contended_s(parts, cores) + 1e-6


def test_what_is_around_leaves_the_parts_less_than_all_cores() -> None:
    assert least_s({"a": Busy(1.0, 3)}, 2.0) == pytest.approx(3 / (2 - AROUND_CORES))
    assert least_s({"a": Busy(2.0), "b": Busy(0.5)}, 2.0) == 2.0, "no step is shorter than its largest part"
    assert least_s({"a": Busy(1.0)}, 0.2) == pytest.approx(10.0), (
        "at least half of what there is, is for the parts"
    )


def test_one_process_on_one_core_waits_for_what_is_around_it() -> None:
    assert contended_s({"a": Busy(2.0)}, 1.0) == pytest.approx(2.0 * (1 + AROUND_CORES), rel=0.03)


def test_the_step_fits_to_the_waiting_that_it_leads_to() -> None:
    """Every set of others by hand: the step that came out slows each part down by as much as was assumed."""
    parts = {"teacher": Busy(0.685), "a": Busy(0.308), "b": Busy(0.287)}
    cores = 2.0
    step_s = contended_s(parts, cores)
    slowed = dict.fromkeys(parts, 1.0)
    for _ in range(200):
        ready = {name: min(1.0, part.seconds * slowed[name] / step_s) for name, part in parts.items()}
        for name in parts:
            others = [ready[other] for other in parts if other != name]
            speed = sum(
                prod(p if here else 1 - p for p, here in zip(others, present, strict=True))
                * min(1.0, cores / (1 + sum(present) + AROUND_CORES))
                for present in product((0, 1), repeat=len(others))
            )
            slowed[name] = 1 / speed
    assert max(part.seconds * slowed[name] for name, part in parts.items()) == pytest.approx(step_s, rel=1e-3)
    assert step_s > 1.05 * 0.685, "two others that are often ready are in the way"
