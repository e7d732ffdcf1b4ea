"""Who gets which slots when several jobs share a cluster, and which slots are started and stopped."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.elastic.scaling_rules import JobScaling, RequestStop, Start
from orchestrator.elastic.worker_pool import IDLE_S, Demand, Slot, SlotState, WorkerPool

CPU, GPU = "cpu", "gpu"


def pool_of(slots: int, shape: str = CPU, **demands: tuple[int, int]) -> WorkerPool[str]:
    """A pool with so many ready slots, each on a node of its own, whatever the jobs demand."""
    pool: WorkerPool[str] = WorkerPool()
    start(pool, pool.prestart(slots, shape))
    for job, (min_workers, max_workers) in demands.items():
        pool.request(job, Demand(min_workers, max_workers, shape))
    return pool


def start(pool: WorkerPool[str], slots: Iterable[Slot[str]]) -> None:
    for slot in slots:
        pool.placed(slot.name, f"node of {slot.name}")
        pool.ready(slot.name, 0.0)


def available(pool: WorkerPool[str], job: str) -> list[str]:
    return [slot.name for slot in pool.available(job)]


def acquire_all(pool: WorkerPool[str], job: str) -> list[str]:
    names = available(pool, job)
    assert pool.acquire(job, names, 0.0) is not None
    return names


def held(pool: WorkerPool[str], job: str) -> list[str]:
    return [slot.name for slot in pool.slots.values() if slot.job == job]


def in_state(pool: WorkerPool[str], state: SlotState) -> list[Slot[str]]:
    return [slot for slot in pool.slots.values() if slot.state is state]


# --- who gets a slot ------------------------------------------------------------------------------------------


def test_a_job_without_slots_leaves_others_their_minimum() -> None:
    """As after a reclaim, when all slots are idle for a moment: the job that asks first must not take all again."""
    pool = pool_of(3, first=(1, 3), second=(1, 3))
    assert len(available(pool, "first")) == 2
    acquire_all(pool, "first")
    acquire_all(pool, "second")
    assert len(available(pool, "first")) == 2
    assert len(available(pool, "second")) == 1
    assert not any(slot.leaving for slot in pool.slots.values())


def test_one_slot_goes_to_the_job_that_asks_first() -> None:
    pool = pool_of(1, first=(1, 3), second=(1, 3))
    acquire_all(pool, "first")
    assert available(pool, "second") == []
    assert pool.num_reclaimed == 0


def test_a_job_below_its_minimum_reclaims_a_slot_of_one_that_is_above_its_own() -> None:
    pool = pool_of(3, first=(1, 3))
    acquire_all(pool, "first")
    pool.request("second", Demand(1, 3, CPU))
    assert available(pool, "second") == []
    assert sum(slot.leaving for slot in pool.available("first")) == 1
    assert pool.num_reclaimed == 1
    assert available(pool, "second") == []
    assert pool.num_reclaimed == 1, "one is enough, however often it asks"
    pool.release("first", 0.0)
    assert not any(slot.leaving for slot in pool.slots.values())
    assert len(available(pool, "first")) == 2
    assert len(available(pool, "second")) == 2, "enough for the first one's minimum is left"


def test_two_jobs_below_their_minimum_reclaim_one_slot_each() -> None:
    pool = pool_of(3, first=(1, 3))
    acquire_all(pool, "first")
    for job in ("second", "third"):
        pool.request(job, Demand(1, 3, CPU))
    assert (available(pool, "second"), available(pool, "third")) == ([], [])
    pool.release("first", 0.0)
    assert [len(acquire_all(pool, job)) for job in ("first", "second", "third")] == [1, 1, 1]


def test_nothing_is_reclaimed_that_would_not_be_enough() -> None:
    """The job could not start, and the other one would have shrunk for nothing."""
    pool = pool_of(3, first=(2, 3))
    acquire_all(pool, "first")
    pool.request("second", Demand(2, 2, CPU))
    assert available(pool, "second") == []
    assert not any(slot.leaving for slot in pool.available("first"))
    start(pool, in_state(pool, SlotState.REQUESTED)[:1])
    assert len(available(pool, "second")) == 1
    assert sum(slot.leaving for slot in pool.available("first")) == 1, "with the new one it is enough"


def test_nothing_is_reclaimed_while_enough_slots_are_starting() -> None:
    pool = pool_of(2, first=(1, 2))
    acquire_all(pool, "first")
    (new,) = pool.request("second", Demand(1, 1, CPU))
    pool.placed(new.name, "a new node")
    assert pool.starting("second") == 1
    assert available(pool, "second") == []
    assert pool.num_reclaimed == 0
    pool.lose([new.name])
    assert available(pool, "second") == []
    assert pool.num_reclaimed == 1, "it never became ready"


def test_slots_of_another_shape_are_neither_offered_nor_owed_nor_reclaimed() -> None:
    pool = pool_of(3, CPU, trains=(1, 3))
    gpus = pool.request("renders", Demand(1, 2, GPU))
    assert [slot.shape for slot in gpus] == [GPU, GPU]
    assert len(acquire_all(pool, "trains")) == 3, "none is left for a job that cannot use it"
    assert available(pool, "renders") == []
    assert pool.num_reclaimed == 0
    pool.placed(gpus[0].name, "n")
    assert (pool.starting("renders"), pool.starting("trains")) == (1, 0)
    pool.ready(gpus[0].name, 0.0)
    assert available(pool, "renders") == [gpus[0].name]
    assert gpus[0].name not in available(pool, "trains")
    pool.withdraw("renders", 0.0)
    assert in_state(pool, SlotState.REQUESTED) == []
    assert len(held(pool, "trains")) == 3


def test_a_new_group_finds_its_slots_in_the_order_they_were_made() -> None:
    """Ranks stay where they were, whatever became idle in which order."""
    pool = pool_of(3, only=(1, 3))
    names = list(pool.slots)
    pool.acquire("only", [names[2], names[0]], 0.0)
    assert available(pool, "only") == [names[2], names[0], names[1]], "its own first, by rank"
    pool.release("only", 1.0)
    assert available(pool, "only") == names


def test_a_slot_is_acquired_by_one_job_only() -> None:
    pool = pool_of(2, first=(1, 2), second=(1, 2))
    (one,) = acquire_all(pool, "first")
    (other,) = available(pool, "second")
    assert pool.acquire("second", [other, one], 0.0) is None
    assert held(pool, "second") == [], "all or none"
    assert pool.acquire("second", [other, "slot-99"], 0.0) is None
    assert pool.acquire("second", [other], 0.0) is not None
    assert pool.acquire("first", [other], 0.0) is None
    assert held(pool, "first") == [one], "what a job has stays if it does not get what it asks for"


def test_acquiring_releases_what_is_not_named() -> None:
    pool = pool_of(3, only=(1, 3))
    first, second, third = acquire_all(pool, "only")
    assert pool.acquire("only", [second], 5.0) is not None
    assert held(pool, "only") == [second]
    assert available(pool, "only") == [second, first, third]


# --- which slots there are ------------------------------------------------------------------------------------


def test_a_job_gets_as_many_slots_as_it_may_use_and_finds_those_of_the_one_before() -> None:
    pool: WorkerPool[str] = WorkerPool()
    prestarted = pool.prestart(1, CPU)
    requested = pool.request("first", Demand(1, 3, CPU))
    assert (len(prestarted), len(requested)) == (1, 2)
    assert pool.request("first", Demand(1, 2, CPU)) == [], "there are enough"
    start(pool, [*prestarted, *requested])
    acquire_all(pool, "first")
    assert pool.withdraw("first", 0.0) == []
    assert pool.request("second", Demand(1, 3, CPU)) == []
    assert len(acquire_all(pool, "second")) == 3


def test_slots_that_wait_for_a_machine_stop_with_the_job_that_wanted_them() -> None:
    pool = pool_of(1, first=(1, 3), second=(1, 2))
    requested = in_state(pool, SlotState.REQUESTED)
    assert len(requested) == 4
    acquire_all(pool, "first")
    stopped = pool.withdraw("first", 0.0)
    assert len(stopped) == 3, "the second one wants two, and one is ready"
    assert all(slot.state is SlotState.LOST and slot.name not in pool.slots for slot in stopped)
    assert stopped == requested[1:], "the one that waits longest stays"
    assert len(pool.withdraw("second", 0.0)) == 1
    assert [slot.state for slot in pool.slots.values()] == [SlotState.READY]
    assert pool.withdraw("second", 0.0) == [], "it is not there any more"


def test_the_replacement_of_a_draining_slot_is_no_surplus() -> None:
    pool = pool_of(3, first=(1, 2), second=(1, 1))
    acquire_all(pool, "first")
    acquire_all(pool, "second")
    (draining, _) = [slot for slot in pool.slots.values() if slot.job == "first"]
    pool.lose(held(pool, "second"))
    (replacement,) = pool.drain([draining.node])
    assert pool.withdraw("second", 0.0) == [replacement], "the one of the two that was requested last"
    assert len(in_state(pool, SlotState.REQUESTED)) == 1, "the first job waits for a second slot"


def test_a_lost_slot_is_replaced() -> None:
    pool = pool_of(2, only=(1, 2))
    first, second = acquire_all(pool, "only")
    lost = pool.slots[first]
    (replacement,) = pool.lose([first, "slot-99"])
    assert lost.state is SlotState.LOST
    assert lost.job == "only", "it tells whose it was"
    assert replacement.state is SlotState.REQUESTED
    assert pool.lose([first]) == [], "once only"
    assert held(pool, "only") == [second]
    pool.withdraw("only", 0.0)
    assert pool.lose([second]) == [], "nobody wants another"


def test_a_node_that_announced_its_end_is_replaced_at_once() -> None:
    pool = pool_of(2, only=(1, 2))
    doomed, other = acquire_all(pool, "only")
    node = pool.slots[doomed].node
    (replacement,) = pool.drain([node, "a node without slots"])
    assert pool.drain([node]) == [], "once only"
    assert [slot.leaving for slot in pool.available("only")] == [True, False]
    start(pool, [replacement])
    assert available(pool, "only") == [doomed, other, replacement.name]
    pool.release("only", 0.0)
    assert available(pool, "only") == [other, replacement.name], "no new group starts on it"
    assert pool.lose([doomed]) == [], "it has been replaced"


def test_a_slot_that_comes_to_a_draining_node_is_replaced_too() -> None:
    pool: WorkerPool[str] = WorkerPool()
    (slot,) = pool.request("only", Demand(1, 1, CPU))
    (replacement,) = pool.placed(slot.name, "doomed", draining=True)
    assert pool.starting("only") == 0
    start(pool, [replacement])
    pool.ready(slot.name, 0.0)
    assert available(pool, "only") == [replacement.name]


@pytest.mark.parametrize("draining", [0, 1])
def test_a_draining_slot_is_not_all_that_a_job_is_offered(draining: int) -> None:
    """Two idle slots, two jobs, one of the slots about to go: one job gets the other slot, whichever it is."""
    pool = pool_of(2, first=(1, 1), second=(1, 1))
    pool.drain([list(pool.slots.values())[draining].node])
    offers = available(pool, "first") + available(pool, "second")
    assert set(offers) == {list(pool.slots)[1 - draining]}


def test_a_job_whose_own_slots_are_draining_reclaims_before_they_go() -> None:
    pool = pool_of(3, first=(1, 2), second=(1, 1))
    acquire_all(pool, "first")
    (own,) = acquire_all(pool, "second")
    pool.drain([pool.slots[own].node])
    available(pool, "second")
    assert sum(slot.reclaimed for slot in pool.available("first")) == 1


def test_a_slot_is_left_for_a_job_whose_own_is_draining() -> None:
    pool = pool_of(2, first=(1, 3), second=(1, 1))
    acquire_all(pool, "first")
    (own,) = acquire_all(pool, "second")
    (replacement, *_) = pool.drain([pool.slots[own].node])
    start(pool, [replacement])
    assert replacement.name not in available(pool, "first")
    assert available(pool, "second") == [own, replacement.name]


def test_an_unresponsive_slot_is_not_handed_out_and_stays() -> None:
    pool = pool_of(2, only=(1, 2))
    slow, other = list(pool.slots)
    pool.slots[slow].unresponsive = True
    assert available(pool, "only") == [other]
    assert pool.request("only", Demand(1, 2, CPU)) == [], "it may only be slow, and is not replaced"
    pool.slots[slow].unresponsive = False
    assert available(pool, "only") == [slow, other]
    acquire_all(pool, "only")
    pool.slots[slow].unresponsive = True
    assert available(pool, "only") == [slow, other], "the group on it hears of it otherwise"


def test_slots_that_nobody_wants_for_a_while_are_stopped() -> None:
    pool = pool_of(2, only=(1, 2))
    acquire_all(pool, "only")
    assert pool.expire(10 * IDLE_S) == [], "a job has them"
    pool.withdraw("only", 100.0)
    assert pool.expire(100.0 + IDLE_S) == []
    assert len(pool.expire(101.0 + IDLE_S)) == 2
    assert not pool.slots
    assert pool.on_node("node of slot-1") == []
    assert len(pool.request("next", Demand(1, 2, CPU))) == 2


def test_idle_slots_wait_for_a_job_that_is_there() -> None:
    pool = pool_of(3, only=(1, 1))
    acquire_all(pool, "only")
    assert pool.expire(10 * IDLE_S) == []


# --- whatever happens -----------------------------------------------------------------------------------------


class SharedPool(RuleBasedStateMachine):
    """Jobs that come, decide and end on nodes that come, announce their end and go."""

    @initialize(nodes=st.integers(1, 6), more=st.integers(0, 5))
    def begin(self, nodes: int, more: int) -> None:
        """One job runs, with as many nodes as it may use or as there are."""
        self.pool: WorkerPool[str] = WorkerPool()
        self.scaling: dict[str, JobScaling] = {}
        self.free_nodes = [f"node-{number}" for number in range(nodes)]
        self.num_nodes, self.now, self.num_jobs = nodes, 0.0, 0
        self.job_comes(1, more, CPU)
        self.slots_are_placed()
        self.time_passes(1.0)
        self.jobs_decide([0, 1, 2, 3])

    @rule(minimum=st.integers(1, 3), more=st.integers(0, 3), shape=st.sampled_from([CPU, CPU, CPU, GPU]))
    def job_comes(self, minimum: int, more: int, shape: str) -> None:
        if len(self.scaling) == 4:
            return
        self.num_jobs += 1
        name, workers = f"job-{self.num_jobs}", (minimum, minimum + more)
        self.pool.request(name, Demand(*workers, shape))
        self.scaling[name] = JobScaling(
            name,
            self.pool,
            workers,
            num_blocks=workers[1],
            num_steps=1_000_000,
            resize_share=1.0,
            now=self.now,
        )

    @rule(pick=st.integers(0, 3))
    def job_ends(self, pick: int) -> None:
        if job := self._job(pick):
            self.pool.withdraw(job, self.now)
            del self.scaling[job]

    @rule(order=st.permutations(range(4)))
    def jobs_decide(self, order: list[int]) -> None:
        for number in order:
            if number < len(self.scaling):
                self._decide(list(self.scaling.values())[number])

    @rule()
    def groups_stop(self) -> None:
        for scaling in self.scaling.values():
            if scaling.stopping:
                scaling.group_ended(self.now, lost=False)

    @rule()
    def node_comes(self) -> None:
        self.num_nodes += 1
        self.free_nodes.append(f"node-{self.num_nodes}")

    @rule(pick=st.integers(0, 9))
    def node_drains(self, pick: int) -> None:
        if nodes := self._nodes():
            self.pool.drain([nodes[pick % len(nodes)]])

    @rule(pick=st.integers(0, 9))
    def node_goes(self, pick: int) -> None:
        if nodes := self._nodes():
            self._go(nodes[pick % len(nodes)])

    @rule()
    def slots_are_placed(self) -> None:
        for slot in in_state(self.pool, SlotState.REQUESTED):
            if self.free_nodes:
                self.pool.placed(slot.name, self.free_nodes.pop(0))

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for slot in in_state(self.pool, SlotState.STARTING):
            self.pool.ready(slot.name, self.now)
        self.free_nodes += [slot.node for slot in self.pool.expire(self.now) if not slot.draining]

    @invariant()
    def groups_have_their_slots_and_nobody_else_does(self) -> None:
        groups = [name for scaling in self.scaling.values() for name in scaling.group]
        assert len(groups) == len(set(groups))
        for job, scaling in self.scaling.items():
            assert held(self.pool, job) == sorted(
                scaling.group, key=lambda name: self.pool.slots[name].number
            )
            assert (
                len({slot.shape for slot in self.pool.available(job)} - {self.pool.demands[job].shape}) == 0
            )

    @invariant()
    def there_are_as_many_slots_as_jobs_want(self) -> None:
        for shape in (CPU, GPU):
            wanted = sum(demand.max_workers for demand in self.pool.demands.values() if demand.shape == shape)
            staying = [slot for slot in self.pool.slots.values() if slot.shape == shape and not slot.draining]
            requested = [slot for slot in staying if slot.state is SlotState.REQUESTED]
            assert len(staying) >= wanted
            assert len(staying) == wanted or not requested, "no machine is asked for that nobody wants"

    @invariant()
    def what_is_counted_is_there(self) -> None:
        for job in self.scaling:
            shape = self.pool.demands[job].shape
            there = [slot for slot in in_state(self.pool, SlotState.STARTING) if slot.shape == shape]
            assert self.pool.starting(job) == sum(not slot.draining for slot in there)

    def teardown(self) -> None:
        """Nothing happens any more but that jobs decide: whichever could have its minimum has it."""
        if not hasattr(self, "pool"):
            return
        for _ in range(40):
            self.slots_are_placed()
            self.time_passes(10.0)
            self.jobs_decide([0, 1, 2, 3])
            self.groups_stop()
        for shape in (CPU, GPU):
            self._nobody_starves(shape)

    def _nobody_starves(self, shape: str) -> None:
        jobs = [job for job, demand in self.pool.demands.items() if demand.shape == shape]
        waiting = [job for job in jobs if not self.scaling[job].group]
        ready = [
            slot for slot in in_state(self.pool, SlotState.READY) if slot.shape == shape and not slot.draining
        ]
        for job in jobs:
            assert job in waiting or len(self.scaling[job].group) >= self.pool.demands[job].min_workers
        if sum(self.pool.demands[job].min_workers for job in jobs) <= len(ready):
            assert not waiting
        used_up = sum(self.pool.demands[job].min_workers for job in jobs if job not in waiting)
        for job in waiting:
            assert self.pool.demands[job].min_workers > len(ready) - used_up, (
                f"{job} could run beside the minimum of the others"
            )

    def _decide(self, scaling: JobScaling) -> None:
        if scaling.group:
            scaling.stepped(scaling.step + 1, 1.0, self.now)
        match scaling.decide(self.now):
            case Start(names):
                assert self.pool.acquire(scaling.job, names, self.now) is not None
                scaling.group_started(names, self.now)
            case RequestStop(reason):
                scaling.stop_requested(reason)

    def _go(self, node: str) -> None:
        lost = self.pool.on_node(node)
        self.pool.lose([slot.name for slot in lost])
        for job in {slot.job for slot in lost if slot.job is not None}:
            self.scaling[job].group_ended(self.now, lost=True)

    def _job(self, pick: int) -> str | None:
        names = list(self.scaling)
        return names[pick % len(names)] if names else None

    def _nodes(self) -> list[str]:
        return [slot.node for slot in self.pool.slots.values() if slot.node]


TestSharedPool = pytest.mark.heavy(SharedPool.TestCase)
TestSharedPool.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
