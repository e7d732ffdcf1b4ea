"""The `zero_stage` setting, and which stage `auto` stands for."""

from __future__ import annotations

from typing import Any, Literal

from orchestrator.config.settings import operational

ZeroStage = Literal["auto", 0, 1, 2, 3]

MAX_REPLICATED_BYTES = 4 * 2**30
"""What every worker may hold of a job's weights, gradients and moments before `auto` shards them."""

# Bytes a weight where every worker holds all of them, with `elastic.exact`. Trained: the fp32 weight, both moments, a
# block's gradient, the sum in float64, and its fp32 copy for AdamW; in bf16 two copies of 2 bytes replace the gradient.
# The average is in fp32, and in bf16 has a copy that computes. Frozen weights are in fp32 at most.
_TRAINED, _AVERAGED, _FROZEN = 4 + 8 + 4 + 8 + 4, 6, 4


def zero_stage_field() -> Any:
    """The setting as a field of a stage."""
    return operational(
        "auto",
        description="How weights, gradients and moments are spread over the workers. 0: each worker holds all of them. "
        "1, 2, 3: the ZeRO stage of DeepSpeed; in bf16, 1 behaves like 2. auto: 0 if a worker holds at most 4 GiB of "
        "them, else 3.",
    )


def chosen_stage(wanted: ZeroStage, trained: int, averaged: int, frozen: int) -> Literal[0, 1, 2, 3]:
    """The ZeRO stage for a job: `wanted`, or what `auto` stands for.

    ZeRO-3 gathers each transformer block before it is used, forward and backward, once for each block of images. That
    pays where the weights would crowd out activations. A smaller model is held whole by every worker (stage 0), and
    workers exchange its gradient once a step. The number of workers does not matter, so that it changes nothing when
    workers come and go.

    Args:
        wanted: what the file says.
        trained: number of trained weights.
        averaged: those of the EMA.
        frozen: those of modules that only compute.
    """
    if wanted != "auto":
        return wanted
    held = _TRAINED * trained + _AVERAGED * averaged + _FROZEN * frozen
    return 0 if held <= MAX_REPLICATED_BYTES else 3
