"""What `plan` says a pipeline costs, against figures of the paper and sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.schema import Hardware
from orchestrator.config.zero_stage import ZeroStage
from orchestrator.elastic.cluster import most_object_store
from orchestrator.errors import UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.cost.costing import Costing, costing, costings
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan import crop_checks
from orchestrator.stages import AnyStage
from orchestrator.stages.base import TrainStage
from orchestrator.stages.common.workload import Net, Workload
from orchestrator.stages.compute_cost import workloads

CONF = Path(__file__).parents[2] / "conf"
PAPER = sorted((CONF / "paper").glob("*.yaml"))


def costs(name: str, *overrides: str) -> dict[str, Costing]:
    loaded = load(CONF / "paper" / name, overrides, needs_data=False)
    assert loaded.spec.hardware is not None
    return {item.work.name: item for item in costings(loaded, loaded.spec.hardware)}


def test_the_published_pretraining_took_57_percent_of_the_peak() -> None:
    """61,440 H100-hours (arXiv 2508.10104) for 1M steps of 4096 images; hundreds of lines of config lie between."""
    pretrain = costs("dinov3_7b.yaml", "hardware.mfu=0.57")["pretrain"]
    assert pretrain.hours == pytest.approx(61_440, rel=0.01)


def test_the_published_vit_l_took_14_hours() -> None:
    """On 32 H100 at 18 % of the peak."""
    pretrain = costs("vitl_imagenet.yaml")["pretrain"]
    assert pretrain.days * 24 == pytest.approx(14, rel=0.1)


def test_every_kind_that_trains_says_what_it_costs_and_one_from_elsewhere_need_not() -> None:
    class Foreign(TrainStage):
        kind: Literal["foreign"]

    assert workloads(Foreign(kind="foreign"), "mine", {}) == []
    silent = workloads.dispatch(Foreign)
    kinds = [kind for kind in get_args(get_args(AnyStage)[0]) if issubclass(kind, TrainStage)]
    assert [kind.__name__ for kind in kinds if workloads.dispatch(kind) is silent] == []


def test_operations_of_a_step_are_those_of_its_parts() -> None:
    """By hand, for a ViT-7B: 2 operations for each parameter and token of a view, and 4·N²·D for its attention."""

    def forward(size: int) -> float:
        patches = (size // 16) ** 2
        tokens = 5 + patches
        block = 4 * 4096**2 + 3 * 4096 * 8192
        return 40 * (2 * tokens * block + 4 * tokens**2 * 4096) + 2 * patches * 768 * 4096

    work = costs("dinov3_7b.yaml")["pretrain"].work
    kept = 0.6  # drop-path 0.4 leaves out whole rows
    assert work.flops["student"] == pytest.approx(3 * kept * (2 * forward(256) + 8 * forward(112)), rel=1e-6)
    heads = {  # rows of an image through 4096 → 8192 → 8192 → bottleneck → prototypes
        "dino": 2 * (4096 * 8192 + 8192**2 + 8192 * 512 + 512 * 262_144),
        "ibot": 2 * (4096 * 8192 + 8192**2 + 8192 * 384 + 384 * 98_304),
    }
    # Half of the crops; 16 of them take the upper ends of 16 cells of 0.1 to 0.5.
    masked = 2 * 256 * 0.5 * (0.3 + 0.2 / 16)
    assert work.flops["student heads"] == pytest.approx(3 * (10 * heads["dino"] + masked * heads["ibot"]))
    teacher = 2 * forward(256) + 2 * heads["dino"] + masked * heads["ibot"]
    assert work.flops["EMA teacher"] == pytest.approx(teacher, rel=1e-6)
    gram = costs("dinov3_7b.yaml")["gram"].work
    assert gram.flops["Gram teacher"] == pytest.approx(2 * forward(512), rel=1e-6)


def test_mixed_sizes_cost_their_mean() -> None:
    only = [
        costs("dinov3_7b.yaml", f"stages.high_res.resolutions=[{{{sizes}, p: 1.0}}]")["high_res"].work
        for sizes in (
            "global_size: 512, local_size: 112, gram_size: 768",
            "global_size: 768, local_size: 112, gram_size: 1152",
        )
    ]
    both = costs(
        "dinov3_7b.yaml",
        "stages.high_res.resolutions=["
        "{global_size: 512, local_size: 112, gram_size: 768, p: 0.25},"
        "{global_size: 768, local_size: 112, gram_size: 1152, p: 0.75}]",
    )["high_res"].work
    mean = 0.25 * only[0].flops_per_image + 0.75 * only[1].flops_per_image
    assert both.flops_per_image == pytest.approx(mean)
    assert both.nets[0].tokens == only[1].nets[0].tokens, "the largest step decides what fits"


def test_memory_by_hand() -> None:
    trained = Net("student", "trained", 1000 * 2**20, 10 * 2**20, depth=4, dim=1024, tokens=1024, width=4.0)
    ema = Net("EMA", "ema", 1000 * 2**20, 10 * 2**20)
    work = Workload("x", 10, 64, 8, (trained, ema), {"all": 1e12}, (2.0**20, 2.0**19), 65536)
    hardware = Hardware(devices=4, peak_tflops=100, memory_gib=80, mfu=0.5)
    memory = costing(work, hardware).memory_gib
    share = 1000 / 1024 / 4
    assert memory["weights"] == pytest.approx(2 * share)
    assert memory["gradients"] == pytest.approx(4 * share)
    assert memory["optimizer"] == pytest.approx(12 * share)
    assert memory["EMA"] == pytest.approx(4 * share)
    assert memory["frozen weights"] == pytest.approx(2 * share)
    assert memory["gathered"] == pytest.approx(8 * 10 / 1024)
    per_block = 1024 * 1024 * (18 + 4 * 4) / 2**30
    assert memory["activations"] == pytest.approx(8 * 4 * per_block)
    assert memory["logits"] == pytest.approx((8 * 8 * 2**20 + 6 * 16 * 2**19) / 2**30)
    less = costing(work, hardware, checkpointing=True, chunk_rows=2).memory_gib
    assert less["activations"] == pytest.approx(8 * (4 * 1024 * 1024 * 2 / 2**30 + per_block))
    assert less["logits"] == pytest.approx(2 * 65536 * (8 + 6) / 2**30)
    assert less["weights"] == memory["weights"]


@pytest.mark.parametrize(
    ("zero_stage", "whole"),
    [
        (0, {"weights", "gradients", "optimizer", "EMA", "frozen weights"}),
        (1, {"weights", "frozen weights"}),  # 2 in bf16
        (2, {"weights", "frozen weights"}),
        (3, set()),
    ],
)
def test_memory_goes_by_what_is_sharded(zero_stage: ZeroStage, whole: set[str]) -> None:
    nets = (Net("student", "trained", 2**30, 2**20), Net("EMA", "ema", 2**30, 2**20))
    work = Workload("x", 10, 64, 8, nets, {"student": 1e12, "EMA": 1e12})
    hardware = Hardware(devices=4, peak_tflops=100, memory_gib=80, mfu=0.5)
    memory = costing(work, hardware, zero_stage=zero_stage).memory_gib
    gradients = 4 if zero_stage else 6  # a block's own in bf16, and the fp32 sum
    each = {"weights": 2, "gradients": gradients, "optimizer": 12, "EMA": 4, "frozen weights": 2}
    for part, gib in each.items():
        assert memory[part] == pytest.approx(gib if part in whole else gib / 4), part
    assert ("reduce bucket" in memory) == (zero_stage > 0)
    assert ("gathered" in memory) == (zero_stage == 3)


@pytest.mark.parametrize(
    ("zero_stage", "per_parameter"),
    [(0, 8), (1, 4 * 4 + 2 + 4), (2, 4 * 4 + 2 + 4), (3, 4 * (8 + 2))],
)
def test_traffic_goes_by_what_is_sharded(zero_stage: ZeroStage, per_parameter: int) -> None:
    """4 blocks a device: replicated gradients are summed once a step, sharded ones and weights go by block."""
    nets = (
        Net("student", "trained", 10**9, 1),
        Net("EMA", "ema", 10**9, 1),
        Net("teacher", "frozen", 10**9, 1),
    )
    work = Workload("x", 1000, 640, 16, nets, {"student": 3e12, "teacher": 1e12})
    hardware = Hardware(devices=10, peak_tflops=100, mfu=0.5, collective_gb_s=100)
    found = costing(work, hardware, zero_stage=zero_stage).step_s["weights and gradients"]
    assert found == pytest.approx(per_parameter * 1e9 / 100e9)


def test_hours_follow_from_the_share_of_the_peak() -> None:
    work = Workload("x", 1000, 100, 10, (Net("n", "frozen", 1, 1),), {"a": 3e12, "b": 1e12})
    hardware = Hardware(devices=10, peak_tflops=100, mfu=0.5)
    found = costing(work, hardware)
    assert found.hours == pytest.approx(4e12 * 100 * 1000 / (50e12 * 3600))
    assert found.days == pytest.approx(found.hours / 240)


def test_a_step_waits_for_weights_and_input_too() -> None:
    """4 blocks a device: 8 bytes a trained parameter, 2 of a network that only computes, none of one that does not."""
    nets = (
        Net("student", "trained", 10**9, 1),
        Net("EMA", "ema", 10**9, 1),
        Net("teacher", "frozen", 10**8, 1),
    )
    work = Workload("x", 1000, 640, 16, nets, {"student": 3e12, "student heads": 1e12, "teacher": 1e12})
    silent = Hardware(devices=10, peak_tflops=100, mfu=0.5)
    assert costing(work, silent).step_s == pytest.approx({"computing": 5e12 * 64 / 50e12})
    hardware = Hardware(devices=10, peak_tflops=100, mfu=0.5, collective_gb_s=100, input_images_s=32)
    found = costing(work, hardware)
    assert found.step_s == pytest.approx(
        {"computing": 6.4, "weights and gradients": 4 * (8 * 1e9 + 2 * 1e8) / 100e9, "input": 2.0}
    )
    assert found.hours_overlapped == pytest.approx(found.hours)
    assert found.hours_apart == pytest.approx((6.4 + 0.328 + 2.0) * 1000 * 10 / 3600)
    student = Workload("x/student", 1000, 640, 16, nets, {"student": 1e9})
    waits = costing(student, hardware)
    assert "input" not in waits.step_s
    assert waits.hours_overlapped == pytest.approx(0.32 * 1000 * 10 / 3600), (
        "the network is what takes longest"
    )


def test_hours_at_a_fitted_share_of_the_peak_say_that_they_predict_nothing() -> None:
    def said(*overrides: str) -> str:
        command = ["plan", str(CONF / "paper" / "dinov3_7b.yaml"), *overrides]
        return CliRunner().invoke(app, command).output

    assert "40% of the peak (assumed)" in said()
    assert "118,154" in said(), "hours with communication and input counted are beside those without"
    fitted = said("hardware.mfu=0.57", "hardware.mfu_source=fitted")
    assert "57% of the peak (fitted to published hours, so the hours below are not a prediction)" in fitted
    assert "61,459" in fitted


@pytest.mark.parametrize("file", PAPER, ids=lambda path: path.stem)
def test_every_paper_file_can_be_planned_without_its_data(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["plan", str(file)])
    assert said.exit_code == 0, said.output
    for wanted in ("GPU-hours", "where the operations go", "GiB on each device", "no such folder"):
        assert wanted in said.output
    assert "more than" not in said.output, "it must fit into the memory it is planned for"
    plain = json.loads(CliRunner().invoke(app, ["plan", str(file), "--json"]).output)
    assert plain["jobs"][0]["gpu_hours"] > 0
    assert not list(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.parametrize("file", PAPER, ids=lambda path: path.stem)
def test_every_paper_file_opens_with_command_hardware_hours_metric_and_deviations(file: Path) -> None:
    head = file.read_text().split("\nname:")[0]
    for wanted in ("orchestrator run conf/paper/", "Hardware", "Hours", "Metric", "Deviations"):
        assert wanted in head.replace("orchestrator run  ", "orchestrator run "), wanted
    assert f"conf/paper/{file.name}" in head


def test_costs_without_hardware_are_refused(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["plan", str(CONF / "full_pipeline.yaml"), "--json"])
    assert "has no `hardware` section" in str(said.exception)


def test_crops_that_a_backbone_from_another_stage_cannot_take_are_refused() -> None:
    """168 is in the paper, and no multiple of 16."""
    wrong = "{global_size: 768, local_size: 168, gram_size: 1152, p: 1.0}"
    with pytest.raises(
        UserError, match="local_size 168 is not a multiple of vit_7b's patch size 16"
    ) as caught:
        costs("dinov3_7b.yaml", f"stages.high_res.resolutions=[{wrong}]")
    assert caught.value.hint == "use 160"
    with pytest.raises(UserError, match="gram_size 500"):
        costs("dinov3_7b.yaml", "stages.gram.crops.gram_size=500")


def test_more_views_than_this_machine_can_hold_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(*overrides: str) -> None:
        loaded = load(CONF / "full_pipeline.yaml", overrides, needs_data=False)
        crop_checks.check(loaded, dag.roles(loaded))

    # 32 images, two views of 64 px and four of 32 px, 3 bytes a pixel.
    step = 32 * 3 * (2 * 64**2 + 4 * 32**2)
    monkeypatch.setattr(crop_checks, "most_object_store", lambda: 10 * step)
    check("stages.distill.window=9")
    with pytest.raises(
        UserError, match=r"11 steps of 1.1 MiB each are kept at the same time.*has 11.2 MiB"
    ) as caught:
        check("stages.distill.window=10")
    assert caught.value.where is not None
    assert "stages.distill.window" in caught.value.where
    assert caught.value.hint == "set window to 9"
    check("stages.distill.window=10", "stages.distill.views=regenerated")
    check("stages.distill.window=10", "cluster.address=auto")
    with pytest.raises(UserError, match="41 steps"):
        check("stages.distill.teachers=39")
    monkeypatch.setattr(crop_checks, "most_object_store", lambda: 2 * step)
    with pytest.raises(UserError) as caught:
        check()
    assert caught.value.hint == "set views: regenerated, or a smaller batch_size"


def test_an_own_cluster_has_no_larger_object_store_than_ray_gives_it() -> None:
    assert 2**28 < most_object_store() < 2**44
