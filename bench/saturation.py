"""From 8 to 4,096 devices, what limits a distillation with one shared teacher: its computing, or what is around it.

Simulated in the steady state (`bench._saturation`) with what is measured here: processor seconds of an
image's crops, calls a second that the coordinator answers, bytes a second that Ray moves between two machines. Steps of
models that do not fit here are computed from their operations, at the share of the peak that `plan` takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench._around import crop_seconds, ray_figures
from bench._saturation import RESOURCES, Design, Node, Saturation, Work, sweep
from bench.harness import Arm, Claim, summarize
from orchestrator.pipeline.cost.device_split import material, splits
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.stages.distill.config import Distill

_ROOT = Path(__file__).parents[1]
_DEVICES = tuple(2**power for power in range(3, 13))
# A machine of 8 H100: two processors of 56 cores, of which some are for the workers; Ray's own limit on the memory
# of an object store; a card of 100 Gbit/s beside those that the devices keep for themselves.
_H100 = Node(devices=8, cores=96, store_gib=200, network_gbit=100)
_VITL_TEACHER = """\
extends: {root}/conf/paper/vitl_imagenet.yaml
name: vitl-family
stages:
  distill:
    kind: distill
    needs: [curate, pretrain]
    steps: 250000
    batch_size: 2048
    block_size: 16
    crops: {{global_size: 224, local_size: 96, num_local: 8}}
    optimizer: {{lr: {{peak: 1.0e-4}}}}
    students: {{vit-s: {{model: vit_s}}, vit-s-plus: {{model: vit_s_plus}}, vit-b: {{model: vit_b}}}}
"""


@dataclass(frozen=True)
class Figures:
    """What was measured here: seconds of a processor for an image's crops by case, and of Ray."""

    crop_s: Mapping[str, float]
    coordinator_calls: float
    ray_gbit: float


@dataclass(frozen=True)
class Case:
    """A teacher and its students on a kind of machine."""

    work: Work
    node: Node


def run(quick: bool, picture: str = "", table: str = "", coordinator_calls: float = 0.0) -> Claim:
    """Measure, then sweep.

    Args:
        quick: without the laptop's sample, and fewer repetitions.
        picture: a PNG to write.
        table: a JSON of all figures to write.
        coordinator_calls: a second, where they are known: then no cluster is started.
    """
    with tempfile.TemporaryDirectory() as folder:
        loaded = _pipelines(Path(folder))
        if quick:
            # Its costs would have to be measured, which takes a minute.
            del loaded["laptop sample"]
        crops = {name: crop_seconds(one, stage, Path(folder), quick) for name, (one, stage) in loaded.items()}
        figures = Figures(crops, *((coordinator_calls, 0.0) if coordinator_calls else ray_figures(quick)))
        cases = {name: _case(one, stage, crops[name]) for name, (one, stage) in loaded.items()}
    built = Design(crops="producers", coordinator_calls=figures.coordinator_calls)
    designs = {
        "as built": built,
        "window 4, whole steps": replace(built, window=4, fetch="step"),
        "crops before the forward": replace(built, crops="inside"),
        "one question a machine": replace(built, ask="node"),
        "and crops made by students": replace(built, crops="students", ask="node"),
    }
    found = {
        name: {design: sweep(case.work, case.node, how, _DEVICES) for design, how in designs.items()}
        for name, case in cases.items()
    }
    if picture:
        _draw(found, Path(picture))
    if table:
        Path(table).write_text(json.dumps(_rows(found, figures), indent=1))
    return _claim(found, figures)


# --- cases ------------------------------------------------------------------------------------------------------


def _pipelines(folder: Path) -> dict[str, tuple[LoadedPipeline, str]]:
    vitl = folder / "vitl.yaml"
    vitl.write_text(_VITL_TEACHER.format(root=_ROOT))
    family = load(_ROOT / "conf/paper/dinov3_family.yaml", [], needs_data=False)
    return {
        "7B → 5 ViTs": (_with(family, "vit-"), "distill"),
        "7B → 4 ConvNeXts": (_with(family, "convnext-"), "distill"),
        "ViT-L → 3 ViTs": (load(vitl, [], needs_data=False), "distill"),
        "laptop sample": (load(_ROOT / "conf/full_pipeline.yaml", [], needs_data=False), "distill"),
    }


def _with(loaded: LoadedPipeline, prefix: str) -> LoadedPipeline:
    """The pipeline, with those students only whose names begin so."""
    stage = loaded.spec.stages["distill"]
    assert isinstance(stage, Distill)
    students = {name: student for name, student in stage.students.items() if name.startswith(prefix)}
    stages = {**loaded.spec.stages, "distill": stage.model_copy(update={"students": students})}
    return replace(loaded, spec=loaded.spec.model_copy(update={"stages": stages}))


def _case(loaded: LoadedPipeline, stage: str, crop_s: float) -> Case:
    from orchestrator.capacity.measured_costs import cores
    from orchestrator.stages.distill.task import bytes_per_image

    (item,) = [one for one in splits(loaded, 4096, refresh=False, say=lambda line: None) if one.name == stage]
    of = material(loaded, stage)
    assert of.recipe is not None
    measured = item.costs.kind == "cpu"
    work = Work(
        teacher=item.costs.teacher,
        students=item.costs.students,
        images=of.stage.batch_size,
        view_bytes=of.stage.view_bytes(of.stage.students.values()) / of.stage.batch_size,
        teacher_bytes=bytes_per_image(of.stage, of.recipe, item.costs.kind.replace("gpu", "cuda")),
        # A measured teacher's step has its crops in it already.
        crop_s=0.0 if measured else crop_s,
    )
    node = Node(devices=cores(), cores=cores(), store_gib=2, network_gbit=1) if measured else _H100
    return Case(work, node)


# --- telling ----------------------------------------------------------------------------------------------------

Found = Mapping[str, Mapping[str, Sequence[Saturation]]]


def _claim(found: Found, figures: Figures) -> Claim:
    arms: dict[str, Arm] = {}
    notes = [
        f"coordinator {figures.coordinator_calls:,.0f} calls a second; "
        + (
            f"Ray {figures.ray_gbit:.1f} Gbit/s from one raylet to another on this machine"
            if figures.ray_gbit
            else "as given, not measured"
        ),
        *(f"crops of an image, {name}: {1e3 * crop_s:.1f} ms" for name, crop_s in figures.crop_s.items()),
    ]
    for name, designs in found.items():
        for design, states in designs.items():
            arms[f"{name}, {design}: η"] = summarize([state.eta for state in states])
            notes.append(f"{name}, {design}: {_path(states)}")
    first = next(iter(found.values()))["as built"]
    return Claim(
        claim="devices to which a 7B's ViT students are limited by computing alone",
        figure=float(max((state.devices for state in first if state.busiest == "compute"), default=0)),
        unit="devices",
        goal=None,
        limit=float(_DEVICES[-1]),
        arms=arms,
        notes=notes,
        better="more",
    )


def _path(states: Sequence[Saturation]) -> str:
    """What limits from how many devices on, and what η is there."""
    said: list[str] = []
    last = ""
    for state in states:
        if state.busiest != last or state is states[-1]:
            last = state.busiest
            said.append(f"{state.devices}: {last}, {state.step_s:.3g} s, η {state.eta:.2f}")
    return "; ".join(said)


def _rows(found: Found, figures: Figures) -> dict[str, Any]:
    rows = [
        {
            "case": name,
            "design": design,
            "devices": state.devices,
            "step_s": state.step_s,
            "eta": state.eta,
            "busiest": state.busiest,
            "teachers": state.split.teachers,
            "workers": dict(state.split.workers),
            "leftover": state.split.leftover,
            "window": state.window,
            "utilisation": state.utilisation(),
        }
        for name, designs in found.items()
        for design, states in designs.items()
        for state in states
    ]
    return {"measured": {"crop_s": dict(figures.crop_s), "coordinator_calls": figures.coordinator_calls,
                         "ray_gbit": figures.ray_gbit}, "rows": rows}  # fmt: skip


def _draw(found: Found, path: Path) -> None:
    """A column for each case: η of every design, and how busy each resource is as built."""
    from matplotlib.figure import Figure

    from orchestrator.evaluation.report.figures import COLORS, DPI, FAINT, INK

    figure = Figure(figsize=(3.1 * len(found), 5.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False, sharex="col")
    for column, (name, designs) in enumerate(found.items()):
        upper, lower = grid[:, column]
        for number, (design, states) in enumerate(designs.items()):
            devices = [state.devices for state in states]
            upper.plot(devices, [state.eta for state in states], label=design,
                       color=COLORS[number % len(COLORS)], linewidth=1.8)  # fmt: skip
        states = designs["as built"]
        devices = [state.devices for state in states]
        for number, resource in enumerate((*RESOURCES, "store")):
            used = [state.utilisation()[resource] for state in states]
            lower.plot(devices, used, label=resource, color=COLORS[number % len(COLORS)], linewidth=1.8,
                       linestyle="--" if number >= len(COLORS) else "-")  # fmt: skip
        upper.set_title(name, fontsize=10, color=INK, loc="left")
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_xticks([8, 64, 512, 4096], ["8", "64", "512", "4,096"])
            axis.set_ylim(-0.03, 1.06)
            axis.grid(color=FAINT, linewidth=0.7)
            axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
            axis.tick_params(colors=INK, labelsize=8, length=0)
        lower.set_xlabel("devices", fontsize=9, color=INK)
    grid[0, 0].set_ylabel("η: all work ÷ devices ÷ step", fontsize=9, color=INK)
    grid[1, 0].set_ylabel("share in use, as built", fontsize=9, color=INK)
    grid[0, -1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    grid[1, -1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
