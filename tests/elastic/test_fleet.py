"""Which seats a job is offered when several share a cluster; the seats are there, only their actors are not."""

from __future__ import annotations

import pytest
import ray

from orchestrator.elastic.fleet import Demand, Fleet, Place, Shape


def fleet(seats: int, **demands: tuple[int, int]) -> Fleet:
    fleet = Fleet()
    for number in range(seats):
        fleet._places[f"s{number}"] = Place(f"s{number}", None, Shape(), health="warm", node=f"n{number}")
    for job, (fewest, most) in demands.items():
        fleet._demands[job] = Demand(fewest, most, Shape())
    return fleet


def offered(fleet: Fleet, job: str) -> list[str]:
    return [place.name for place in fleet.on_offer(job)]


def test_a_job_without_seats_leaves_others_their_fewest() -> None:
    """As after a recall, when all seats are idle for a moment: whoever asks first must not take all again."""
    shared = fleet(3, first=(1, 3), second=(1, 3))
    assert len(offered(shared, "first")) == 2
    assert shared.take("first", offered(shared, "first")) is not None
    assert shared.take("second", offered(shared, "second")) is not None
    assert len(offered(shared, "first")) == 2
    assert len(offered(shared, "second")) == 1
    assert not any(place.recalled for place in shared._places.values())


def test_one_seat_goes_to_who_asks_first() -> None:
    shared = fleet(1, first=(1, 3), second=(1, 3))
    assert len(offered(shared, "first")) == 1
    assert shared.take("first", offered(shared, "first")) is not None
    assert offered(shared, "second") == []


def test_a_job_below_its_fewest_gets_a_seat_back_from_one_that_has_more() -> None:
    shared = fleet(3, first=(1, 3))
    assert shared.take("first", offered(shared, "first")) is not None
    shared._demands["second"] = Demand(1, 3, Shape())
    assert offered(shared, "second") == []
    assert sum(place.leaving for place in shared.on_offer("first")) == 1
    shared.give_back("first")
    assert len(offered(shared, "first")) == 2
    assert len(offered(shared, "second")) == 2, "enough for the first one's fewest is left"


def test_an_answer_of_a_seat_that_another_job_dropped_meanwhile_is_not_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    shared = fleet(1, first=(1, 1))
    place = shared._places["s0"]
    place.health, place.pending = "placing", {"where": "its answer"}
    shared.leave("first")
    assert not shared._places
    shared._take_in(place, "its answer")
