"""How `plan` shows what a pipeline will cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.config.schema import Hardware
from orchestrator.pipeline.cost.costing import Costing
from orchestrator.table import stage_table

_MEMORY_PARTS = (
    "weights", "gradients", "optimizer", "EMA", "frozen weights", "gathered", "reduce bucket",
    "activations", "logits",
)  # fmt: skip


def print_costs(console: Console, hardware: Hardware, costings: Sequence[Costing]) -> None:
    """What is computed and how long it takes, what else a step waits for, where operations go, memory on a device."""
    console.print()
    console.print(Text(_headline(hardware), style="bold"), soft_wrap=True)
    table = stage_table("job", "parameters", "steps", "batch", "TFLOP/image", "FLOP", "GPU-hours", "days")
    for item in costings:
        work = item.work
        table.add_row(
            work.name,
            count(work.nets[0].params),
            f"{work.steps:,}",
            f"{work.batch_size:,}",
            f"{work.flops_per_image / 1e12:.3g}",
            f"{work.total_flops:.3g}",
            f"{item.hours:,.0f}",
            f"{item.days:.1f}",
        )
    total = sum(item.hours for item in costings)
    table.add_row("all", "", "", "", "", "", f"{total:,.0f}", f"{total / hardware.devices / 24:.1f}")
    console.print(table)
    if any(len(item.step_s) > 1 for item in costings):
        _print_steps(console, costings)
    _print_parts(console, costings)
    _print_memory(console, hardware, costings)


def as_dict(hardware: Hardware, costings: Sequence[Costing]) -> dict[str, Any]:
    """The same for programs."""
    return {
        "hardware": hardware.model_dump(),
        "jobs": [
            {
                "name": item.work.name,
                "params": {net.name: net.params for net in item.work.nets},
                "flops_per_image": dict(item.work.flops),
                "total_flops": item.work.total_flops,
                "gpu_hours": item.hours,
                "days": item.days,
                "memory_gib": item.memory_gib,
                "zero_stage": item.zero_stage,
                "step_s": item.step_s,
                "gpu_hours_overlapped": item.hours_overlapped,
                "gpu_hours_apart": item.hours_apart,
            }
            for item in costings
        ],
    }


def count(number: float) -> str:
    """6.72 B, 303 M, 5,120."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:,.0f}"


def _headline(hardware: Hardware) -> str:
    source = {
        "assumed": "assumed",
        "measured": "measured",
        "fitted": "fitted to published hours, so the hours below are not a prediction",
    }[hardware.mfu_source]
    return (
        f"{hardware.devices} × {hardware.name}, {hardware.peak_tflops:,.0f} TFLOP/s bf16 and "
        f"{hardware.memory_gib:g} GiB each, at {hardware.mfu:.0%} of the peak ({source})"
    )


def _print_steps(console: Console, costings: Sequence[Costing]) -> None:
    """With communication and input: hours if they hide behind the longest of them, and if they do not."""
    console.print()
    causes = list(dict.fromkeys(cause for item in costings for cause in item.step_s))
    table = stage_table("seconds of a step", *causes, "GPU-hours, all at once", "one after another")
    for item in costings:
        cells = [f"{item.step_s[cause]:.3g}" if cause in item.step_s else "" for cause in causes]
        table.add_row(item.work.name, *cells, f"{item.hours_overlapped:,.0f}", f"{item.hours_apart:,.0f}")
    overlapped, apart = (
        sum(getattr(item, name) for item in costings) for name in ("hours_overlapped", "hours_apart")
    )
    table.add_row("all", *("" for _ in causes), f"{overlapped:,.0f}", f"{apart:,.0f}")
    console.print(table)


def _print_parts(console: Console, costings: Sequence[Costing]) -> None:
    console.print()
    table = stage_table("where the operations go", "TFLOP/image", "share")
    for item in costings:
        for part, flops in item.work.flops.items():
            share = flops / item.work.flops_per_image
            table.add_row(f"{item.work.name}: {part}", f"{flops / 1e12:.3g}", f"{share:.0%}")
    console.print(table)


def _print_memory(console: Console, hardware: Hardware, costings: Sequence[Costing]) -> None:
    console.print()
    parts = [part for part in _MEMORY_PARTS if any(part in item.memory_gib for item in costings)]
    table = stage_table("GiB on each device", "ZeRO", *parts, "all")
    for item in costings:
        total = sum(item.memory_gib.values())
        style = "red" if total > hardware.memory_gib else ""
        cells = [f"{item.memory_gib[part]:.2g}" if part in item.memory_gib else "" for part in parts]
        fits = "" if total <= hardware.memory_gib else f", more than {hardware.memory_gib:g}"
        table.add_row(item.work.name, str(item.zero_stage), *cells, Text(f"{total:.3g}{fits}", style=style))
    console.print(table)
