"""What `plan` says that a student from elsewhere costs, against formulas and sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config.schema import Hardware
from orchestrator.models.configs import ViTConfig
from orchestrator.models.cost import forward_flops, head_flops, head_params
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.pipeline.cost.costing import costing
from orchestrator.stages.common.config import Heads
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.network_cost import network_cost
from orchestrator.stages.ssl.pretrain import Pretrain

HERE = f"{__name__}:Plain"
WIDTH, PATCH = 6, 8
COMMON: dict[str, Any] = {
    "steps": 10, "batch_size": 8, "block_size": 4, "optimizer": {"lr": {"peak": 1e-3}},
    "crops": {"global_size": 64, "local_size": 32, "num_local": 3},
}  # fmt: skip
TEACHER = Pretrain.model_validate({**COMMON, "kind": "pretrain", "model": "vit_femto"})


class Plain(nn.Module):
    """Two convolutions with a ReLU between them, and a scale that the features do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 1)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.second(self.first(images_BCHW).relu())  # type: ignore[no-any-return]


def multiply_adds(size: int) -> int:
    return (size // PATCH) ** 2 * (3 * PATCH**2 * WIDTH + WIDTH**2)


def held(size: int) -> int:
    """The image, for the first convolution, and what comes out of the ReLU, for itself and the second one; in bf16."""
    return 2 * (3 * size**2 + WIDTH * (size // PATCH) ** 2)


PARAMS = 3 * PATCH**2 * WIDTH + WIDTH + WIDTH**2 + WIDTH


def test_a_module_costs_what_its_layers_do() -> None:
    found = network_cost(NetworkSpec("module", HERE), 64, (32,))
    assert found is not None
    assert (found.dim, found.patch_size, found.params) == (WIDTH, PATCH, PARAMS)
    assert found.unit == 3 * PATCH**2 * WIDTH + WIDTH
    assert dict(found.flops) == {size: 2 * multiply_adds(size) for size in (64, 32)}
    assert dict(found.activation_bytes) == {size: held(size) for size in (64, 32)}


@pytest.mark.heavy
def test_a_vision_transformer_of_timm_costs_what_the_formula_of_ours_says() -> None:
    """The counter has to see its attention, which most of torch's kernels hide."""
    name, config = "vit_tiny_patch16_224", ViTConfig(
        dim=192, depth=12, num_heads=3, patch_size=16, num_storage_tokens=0
    )  # fmt: skip
    found = network_cost(NetworkSpec("timm", name, {"dynamic_img_size": True}), 224, (96,))
    assert found is not None
    assert dict(found.flops) == {size: forward_flops(config, size, size) for size in (224, 96)}


def test_what_cannot_be_built_has_no_cost() -> None:
    assert network_cost(NetworkSpec("module", f"{__name__}:nothing"), 64) is None
    assert network_cost(NetworkSpec("module", HERE), 60, (3,)) is None


@pytest.mark.parametrize("objective", ["heads", "features"])
def test_students_from_elsewhere_are_among_the_jobs(objective: str) -> None:
    more: dict[str, Any] = {"features": {}} if objective == "features" else {}
    students = {"mine": {"module": HERE, "steps": 20}, "ours": {"model": "vit_femto"}}
    stage = Distill.model_validate({**COMMON, "kind": "distill", "students": students, **more})
    jobs = {job.name: job for job in workloads(stage, "distill", {"origin": TEACHER})}
    assert list(jobs) == ["distill/teacher", "distill/mine", "distill/ours"]
    mine, heads = jobs["distill/mine"], Heads()
    # Features are learned from global crops alone, by default.
    num_local = 3 if objective == "heads" else 0
    forward, params = 2 * (2 * multiply_adds(64) + num_local * multiply_adds(32)), PARAMS
    if objective == "heads":
        for bottleneck, prototypes in (
            (heads.dino_bottleneck, heads.dino_prototypes),
            (heads.ibot_bottleneck, heads.ibot_prototypes),
        ):
            params += head_params(WIDTH, heads.hidden, bottleneck, prototypes)
        dino = head_flops(WIDTH, heads.hidden, heads.dino_bottleneck, heads.dino_prototypes)
        ibot = head_flops(WIDTH, heads.hidden, heads.ibot_bottleneck, heads.ibot_prototypes)
        masked = mine.logits[0] - 5 * heads.dino_prototypes
        forward += 5 * dino + masked / heads.ibot_prototypes * ibot
    assert mine.total_flops == pytest.approx(3 * forward * 8 * 20)
    assert [net.params for net in mine.nets] == [params, params]
    hardware = Hardware(devices=1, memory_gib=1, peak_tflops=1)
    memory = costing(mine, hardware).memory_gib["activations"]
    assert memory * 2**30 == pytest.approx(4 * (2 * held(64) + num_local * held(32)))
