"""What a slot asks Ray for, and what a cluster is not asked for: rules without a cluster."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.elastic import EVERY_DEVICE, Elastic, Resources
from orchestrator.elastic.resources import (
    Node,
    SlotShape,
    check_resources,
    has_gpus,
    refuse_shared_gpus,
    slot_shape,
    slots_on,
    worker_range,
)
from orchestrator.errors import UserError

GIB = 2.0**30


def node(name: str = "n", *, cpu: float = 8, gpu: float = 0, kind: str = "", **labels: str) -> Node:
    resources = {"CPU": cpu, "memory": 16 * GIB, **({"GPU": gpu} if gpu else {})}
    return Node(name, resources | ({f"accelerator_type:{kind}": 1.0} if kind else {}), labels)


def elastic(device: str = "auto", workers: Any = (1, 2), **resources: Any) -> Elastic:
    return Elastic.model_validate({"device": device, "workers": workers, "resources": resources})


def shape_of(section: Elastic, *nodes: Node) -> SlotShape:
    return slot_shape(section, 1.0, has_gpus(section, nodes))


def refused(section: Elastic, *nodes: Node) -> str:
    with pytest.raises(UserError) as caught:
        check_resources(section, shape_of(section, *nodes), nodes, "stages.pretrain.elastic")
    return str(caught.value)


def allowed(section: Elastic, *nodes: Node, growing: bool = False) -> None:
    shape = shape_of(section, *nodes)
    check_resources(section, shape, nodes, "stages.pretrain.elastic", growing=growing)


@pytest.mark.parametrize(
    ("device", "with_gpus", "resources", "cpus", "gpus"),
    [
        ("auto", False, {}, 1.0, 0.0),
        ("auto", True, {}, 0.0, 0.25),  # the share that the caller gives
        ("auto", True, {"gpu": 2}, 0.0, 2.0),
        ("auto", False, {"gpu": 2}, 1.0, 0.0),
        ("cpu", True, {"gpu": 0.5}, 1.0, 0.0),
        ("cpu", True, {"cpu": 4}, 4.0, 0.0),
        ("gpu", False, {"gpu": 0.5, "cpu": 2}, 2.0, 0.5),
    ],
)
def test_a_slot_takes_what_the_file_says_and_cpu_never_a_gpu(
    device: str, with_gpus: bool, resources: dict[str, Any], cpus: float, gpus: float
) -> None:
    shape = slot_shape(elastic(device, **resources), 0.25, with_gpus)
    assert (shape.cpus, shape.gpus) == (cpus, gpus)
    assert (shape.ray_options()["num_cpus"], shape.ray_options()["num_gpus"]) == (cpus, gpus)


def test_equal_sections_give_equal_slots_whatever_their_order() -> None:
    one = {"labels": {"a": "1", "b": "2"}, "runtime_env": {"pip": ["x"], "env_vars": {"A": "1", "B": "2"}}}
    other = {"labels": {"b": "2", "a": "1"}, "runtime_env": {"env_vars": {"B": "2", "A": "1"}, "pip": ["x"]}}
    first, second = (slot_shape(elastic(**each), 1.0, False) for each in (one, other))
    assert first == second
    assert len({first, second}) == 1
    assert first != slot_shape(elastic(**one, memory="1GiB"), 1.0, False)
    options = slot_shape(elastic(**one, memory="1.5GiB", accelerator_type="H100"), 1.0, True).ray_options()
    assert options == {
        "num_cpus": 0.0,
        "num_gpus": 1.0,
        "memory": int(1.5 * GIB),
        "accelerator_type": "H100",
        "label_selector": {"a": "1", "b": "2"},
        "runtime_env": {"pip": ["x"], "env_vars": {"A": "1", "B": "2"}},
    }


def test_secrets_of_the_runtime_environment_are_not_shown() -> None:
    section = elastic(runtime_env={"env_vars": {"TOKEN": "hunter2", "PORT": 8080}})
    shape = slot_shape(section, 1.0, False)
    assert shape.ray_options()["runtime_env"]["env_vars"] == {"TOKEN": "hunter2", "PORT": "8080"}
    shown = f"{section!r} {section} {shape!r} {shape} {section.model_dump_json()}"
    assert "hunter2" not in shown
    assert "TOKEN" in section.model_dump_json()
    with pytest.raises(ValidationError, match=r"unknown key 'env_var'") as caught:
        Resources(runtime_env={"env_var": {"TOKEN": "hunter2"}})
    assert "hunter2" not in str(caught.value.errors()[0]["msg"])


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"gpu": 1.5}, "a whole number, or a share below 1, not 1.5"),
        ({"cpu": 2.5}, "a whole number, or a share below 1, not 2.5"),
        ({"gpu": 0}, "greater than 0"),
        ({"gpu": math.nan}, "finite number"),
        ({"gpu": math.inf}, "finite number"),
        ({"memory": "8 bananas"}, "8GiB or 500MB, not '8 bananas'"),
        ({"memory": 0}, "greater than 0"),
        ({"labels": {"pool": "a b"}}, "pool: 'a b' is not a label's value"),
        ({"runtime_env": {"env_vars": {"A": True}}}, "env_vars.A must be a text"),
        ({"gpus": 1}, "Extra inputs"),
    ],
)
def test_what_ray_would_refuse_later_is_refused_in_the_file(resources: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Resources.model_validate(resources)
    assert expected in str(caught.value)


def test_memory_is_a_number_of_bytes_or_a_text() -> None:
    sizes = {"8GiB": 2**33, "500MB": 500 * 10**6, "1.5 kib": 1536, "12": 12, 7: 7}
    assert {size: Resources.model_validate({"memory": size}).memory for size in sizes} == sizes


def test_workers_auto_is_every_device_that_is_there() -> None:
    section = elastic(workers="auto")
    assert section.workers == (1, EVERY_DEVICE)
    assert section.model_dump()["workers"] == "auto"
    assert Elastic.model_validate_json(section.model_dump_json()) == section
    gpus = [node("a", gpu=4), node("b", gpu=2), node("c")]
    assert worker_range(section, shape_of(section, *gpus), gpus) == (1, 6)
    cpus = [node("a", cpu=4), node("b", cpu=2)]
    assert worker_range(section, shape_of(section, *cpus), cpus) == (1, 6)
    at_least = elastic(workers=[3, "auto"])
    assert worker_range(at_least, shape_of(at_least, *gpus), gpus) == (3, 6)
    assert worker_range(at_least, shape_of(at_least), []) == (3, 3), "it waits for machines, with its minimum"
    own = Node("own", {"CPU": 8.0, "memory": 16 * GIB}, {}, cores=2)
    assert worker_range(section, shape_of(section, own), [own]) == (1, 2), "more places than cores"
    fixed = elastic(workers=[1, 2])
    assert worker_range(fixed, shape_of(fixed, *gpus), gpus) == (1, 2)


def test_a_node_holds_as_many_slots_as_its_scarcest_resource_allows() -> None:
    big = node(cpu=8, gpu=4, kind="H100", pool="spot")
    assert slots_on(SlotShape(0.0, 2.0), big) == 2
    assert slots_on(SlotShape(3.0, 1.0), big) == 2
    assert slots_on(SlotShape(0.0, 0.25), big) == 4, "two workers of a job on one GPU would not be faster"
    assert slots_on(SlotShape(1.0, memory=int(5 * GIB)), big) == 3
    assert slots_on(SlotShape(0.5), big) == 16
    assert slots_on(SlotShape(1.0, accelerator_type="A100"), big) == 0
    for selector, slots in (("spot", 8), ("!spot", 0), ("in(spot,other)", 8), ("!in(a,b)", 8), ("other", 0)):
        assert slots_on(SlotShape(1.0, labels=(("pool", selector),)), big) == slots, selector


def test_auto_looks_only_at_nodes_that_a_worker_may_be_on() -> None:
    nodes = [node("a", pool="cpu"), node("b", gpu=1, pool="gpu")]
    assert shape_of(elastic(), *nodes).gpus == 1
    assert shape_of(elastic(labels={"pool": "cpu"}), *nodes).gpus == 0
    assert shape_of(elastic("cpu"), *nodes).gpus == 0


def test_a_gpu_that_no_node_has_is_refused_before_the_first_step() -> None:
    message = refused(elastic("gpu"), node())
    assert "device is gpu, and no node of the cluster has a GPU" in message
    assert "stages.pretrain.elastic.device" in message
    assert "set device: cpu" in message
    allowed(elastic("gpu"), node(), node(gpu=1))
    allowed(elastic("auto"), node())
    allowed(elastic("gpu"), node(cpu=0))  # a head alone: all spot machines are away, and are waited for
    allowed(elastic("gpu"), node(), growing=True)  # an autoscaler may bring one


def test_an_accelerator_or_label_that_no_node_has_is_refused_with_what_there_is() -> None:
    nodes = [node("a", gpu=1, kind="H100", pool="spot"), node("b", gpu=1, kind="A100", pool="fixed")]
    message = refused(elastic(accelerator_type="V100X"), *nodes)
    assert "no node of the cluster has an accelerator of type V100X" in message
    assert "H100" in message
    assert "'H100'" in refused(elastic(accelerator_type="H10"), *nodes)
    message = refused(elastic(labels={"pool": "spots"}), *nodes)
    assert "no node of the cluster has the labels pool=spots" in message
    assert "hint the nodes have: 1 × pool=fixed; 1 × pool=spot" in message
    message = refused(elastic(accelerator_type="H100", labels={"pool": "fixed"}), *nodes)
    assert "no node with H100 of the cluster has the labels pool=fixed" in message
    assert "hint the nodes have: 1 × pool=spot" in message
    allowed(elastic(accelerator_type="H100", labels={"pool": "spot"}), *nodes)


def test_a_worker_that_fits_on_no_node_is_refused() -> None:
    message = refused(elastic("cpu", cpu=16), node(cpu=8), node(cpu=4))
    assert "no node of the cluster is large enough for a worker with 16 CPU" in message
    assert "1 × 0 GPU, 8 CPU, 16 GiB" in message
    assert "large enough" in refused(elastic(memory="64GiB"), node())
    assert "large enough" in refused(elastic("gpu", gpu=4), node(gpu=2))


def test_more_workers_on_shares_than_there_are_gpus_are_refused() -> None:
    message = refused(elastic("gpu", workers=2, gpu=0.5), node(gpu=1))
    assert "2 workers on shares of 1 GPU: two workers of one job cannot be on one GPU" in message
    assert "stages.pretrain.elastic.workers" in message
    allowed(elastic("gpu", workers=2, gpu=0.5), node(gpu=1), node(gpu=1))
    allowed(elastic("gpu", workers=1, gpu=0.5), node(gpu=1))
    allowed(elastic("cpu", workers=2, gpu=0.5), node(gpu=1))


def test_two_ranks_of_one_group_on_one_gpu_are_refused_with_a_reason() -> None:
    refuse_shared_gpus([("a", ("0",)), ("a", ("1",)), ("b", ("0",)), ("b", ("1", "2"))])
    refuse_shared_gpus([("a", ()), ("a", ()), ("b", ())])
    with pytest.raises(UserError) as caught:
        refuse_shared_gpus([("a", ("0",)), ("b", ("0",)), ("a", ("1", "0"))])
    assert (
        "workers 0 and 2 of one job would be on the same GPU, number 0 of node a: NCCL" in caught.value.what
    )
    assert caught.value.hint == (
        "set resources.gpu to 1, so that each worker has a whole GPU, or workers to 1"
    )


def test_a_stage_overlays_the_pipelines_resources_key_by_key() -> None:
    default = elastic("gpu", workers=4, gpu=1, memory="8GiB", labels={"pool": "spot"})
    own = Elastic.model_validate({"resources": {"memory": None, "cpu": 2}})
    merged = default.overlaid(own)
    assert merged.resources == Resources(gpu=1, cpu=2, labels={"pool": "spot"})
    assert (merged.device, merged.workers) == ("gpu", (4, 4))
    assert default.overlaid(None) is default
