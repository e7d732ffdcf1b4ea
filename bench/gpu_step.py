"""A training step on one GPU: images a second, share of the peak, memory beside what `plan` predicts.

    python bench/gpu_step.py                       # the published ViT-L recipe, as conf/paper/vitl_imagenet.yaml has it
    python bench/gpu_step.py --photos data/food    # with the loader, whose waits are in the table
    python bench/gpu_step.py --batch 96 --arm compiled --steps 30 --out table.json

The step is the engine's own: the task of the file's `pretrain` stage under ZeRO on one rank, bf16, scaled dot product
attention; random pixels in the place of photographs, or with `--photos FOLDER` the photographs below a folder, loaded
and copied as in training. Without a GPU it runs a tiny model for a moment, which shows that
it works and nothing else. No claim of `python -m bench`: its figures mean something on the machine they name only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch._C._distributed_c10d import HashStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.config.schema import Hardware
from orchestrator.data.blocks import CropBlocks
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sampler import SampleOrder
from orchestrator.models.presets import preset
from orchestrator.pipeline.cost.costing import costing
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.stages.ssl.task import SelfSupervisedTask
from orchestrator.training.collectives import AllWorkers
from orchestrator.training.device import device as assigned_device
from orchestrator.training.device import use_deterministic_kernels
from orchestrator.training.device_copies import DeviceCopies
from orchestrator.training.engine import Engine, build_engine
from orchestrator.training.loader import BlockLoader
from orchestrator.training.loader_process import ProcessBlocks
from orchestrator.training.task import BlockTensors
from orchestrator.training.zero import import_deepspeed

# Dense bf16 operations a second, in 10¹², from the makers' data sheets.
_PEAKS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
_ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "recomputed": {"activation_checkpointing": True},
    "compiled, recomputed": {"compile": True, "activation_checkpointing": True},
    "compiled, chunked": {"compile": True, "chunk_rows": 256},
    "replicated": {"zero_stage": 0},
    "compiled, exact": {"compile": True, "elastic": {"exact": True}},
}
_WARMUP = 5
_ONE = Hardware(devices=1)
_PAPER = Path(__file__).parents[1] / "conf" / "paper"
_TINY = {
    "heads": {"hidden": 64, "dino_prototypes": 256, "ibot_prototypes": 128},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "model_overrides": {},
    "koleo_group": None,
}


@dataclass(frozen=True)
class Row:
    """One arm: medians over the timed steps. `mfu` is None where the device's peak is not known.

    `waited_share` is the share of the timed steps that was waited for photographs.
    """

    model: str
    arm: str
    batch: int
    images_per_s: float
    mfu: float | None
    peak_gib: float
    planned_gib: float
    loss: float
    waited_share: float = 0.0


def main() -> None:
    """Measure and print a table; the last line is JSON."""
    options = _options()
    if options.arm != [options.only]:
        _each_in_its_own_process(options)
        return
    device = assigned_device()
    cuda = device != "cpu"
    name = torch.cuda.get_device_name() if cuda else "CPU (shows that it works, nothing else)"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_deepspeed()
    dist.init_process_group("nccl" if cuda else "gloo", store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("nccl" if cuda else "gloo", dist_init_required=False, verbose=False)
    row = _measure(options.only, options, device, _peak(name))
    _say(json.dumps({"device": name, "torch": torch.__version__, "rows": [asdict(row)]}))
    dist.destroy_process_group()


def _each_in_its_own_process(options: argparse.Namespace) -> None:
    """DeepSpeed's engines do not let go of their memory."""
    found: dict[str, Any] = {}
    for arm in options.arm:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--only", arm]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = child.stdout.splitlines()
        if child.returncode or not lines:
            reason = [line for line in child.stderr.splitlines() if "Error" in line][-1:]
            _say(f"{arm}: {' '.join(reason) or 'no result'}")
            continue
        one = json.loads(lines[-1])
        _say(_line(Row(**one["rows"][0])))
        one["rows"] = found.get("rows", []) + one["rows"]
        found = one
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    _say(json.dumps(found))
    if not found:
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=_PAPER / "vitl_imagenet.yaml", help="a pipeline file")
    parser.add_argument("--stage", default="pretrain", help="its stage of kind `pretrain`")
    parser.add_argument("--model", help="another model than the file's")
    parser.add_argument("--arm", nargs="+", default=list(_ARMS), choices=list(_ARMS))
    parser.add_argument("--batch", type=int, default=64, help="images on the GPU at once")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument(
        "--zero", type=int, default=3, choices=(0, 1, 2, 3), help="not of the arm `replicated`"
    )
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs; default: random pixels")
    parser.add_argument("--loaders", type=int, default=8, help="threads or processes that load photographs")
    parser.add_argument("--loader-type", default="threads", choices=("threads", "processes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(arm: str, options: argparse.Namespace, device: str, peak: float | None) -> Row:
    cuda = device != "cpu"
    batch = options.batch if cuda else 4
    stage = yaml.safe_load(options.file.read_text())["stages"][options.stage]
    model = (options.model or stage["model"]) if cuda else "vit_femto"
    config = Pretrain.model_validate(
        {
            **stage,
            **({} if cuda else _TINY),
            "model": model,
            "batch_size": batch,
            "block_size": batch,
            **_ARMS[arm],
        }
    )
    recipe = config.model_recipe()
    assert recipe is not None
    torch.manual_seed(0)
    task = SelfSupervisedTask(config, recipe, 0, None)
    exact = config.elastic is not None and bool(config.elastic.exact)
    if exact:
        use_deterministic_kernels()
    modules = task.build(device)
    zero_stage = _ARMS[arm].get("zero_stage", options.zero)
    engine = build_engine(
        modules,
        config.optimizer,
        zero_stage=zero_stage,
        precision="bf16" if cuda else "fp32",
        num_blocks=1,
        exact=exact,
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, waited, loss = [], [], 0.0
    with closing(_blocks(config, model, batch, device, options)) as blocks:
        for step in range(_WARMUP + options.steps if cuda else 2):
            _wait(cuda)
            began = time.perf_counter()
            block, waited_s = next(blocks)
            waited.append(waited_s)
            # Random pixels are made outside of the time that counts.
            began = began if options.photos else time.perf_counter()
            loss = _step(task, engine, block, step)
            _wait(cuda)
            seconds.append(time.perf_counter() - began)
    timed = seconds[_WARMUP:] or seconds
    speed = batch / statistics.median(timed)
    (work,) = workloads(config, model, {})
    planned = costing(
        work,
        _ONE,
        checkpointing=config.activation_checkpointing,
        chunk_rows=config.chunk_rows,
        zero_stage=zero_stage,
    )
    return Row(
        model,
        arm,
        batch,
        speed,
        None if peak is None else speed * work.flops_per_image / (peak * 1e12),
        torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        sum(planned.memory_gib.values()),
        loss,
        sum(waited[-len(timed) :]) / sum(timed),
    )


def _step(task: SelfSupervisedTask, engine: Engine, block: BlockTensors, step: int) -> float:
    task.prepare_step(step)
    (target,) = task.targets([block], AllWorkers())
    losses = task.losses(block, target)
    engine.backward(losses.total)
    engine.step(1e-4, step, 0.04)
    engine.update_ema(0.999)
    return float(losses.total.detach())


def _blocks(
    config: Pretrain, model: str, batch: int, device: str, options: argparse.Namespace
) -> Generator[tuple[BlockTensors, float], None, None]:
    """The block of each step, and the seconds that it was waited for."""
    if options.photos is None:
        for step in itertools.count():
            yield _block(config, model, step, batch, device), 0.0
    make = partial(_photo_blocks, options.photos, config, preset(model).patch_size)
    copies = DeviceCopies(device)
    with closing(ProcessBlocks(make, 1)) as processes:
        source = processes if options.loader_type == "processes" else make()
        # A block is loaded by one loader, and a step has one block: so many steps are loaded at once.
        loaders = options.loaders
        loader = BlockLoader(source, [0], loaders, loaders, loaders, copies.send)
        with closing(loader.steps(0, 10**9)) as steps:
            for _, sent in steps:
                (block,) = copies.arrived(sent)
                yield block, loader.waited_s


def _photo_blocks(folder: Path, config: Pretrain, patch_size: int) -> CropBlocks:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    rows = [ImageRecord("photos", str(path.relative_to(folder)), str(folder), "", 1, 1) for path in files]
    order = SampleOrder({"all": np.arange(len(rows))}, batch_size=config.batch_size, seed=0)
    return CropBlocks(
        ImageIndex(rows),
        order,
        lambda step: config.crops,
        patch_size=patch_size,
        block_size=config.block_size,
        seed=0,
        max_unreadable=0.01,
    )


def _block(config: Pretrain, model: str, step: int, batch: int, device: str) -> BlockTensors:
    random = torch.Generator().manual_seed(step)
    crops = config.crops

    def pixels(views: int, size: int) -> torch.Tensor:
        shape = (views, batch, 3, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(device)

    patches = (crops.global_size // preset(model).patch_size) ** 2
    # Half of the crops are masked, by 30 % on average.
    masks = torch.zeros(crops.num_global, batch, patches, dtype=torch.bool)
    masks[:, : batch // 2] = torch.rand(crops.num_global, batch // 2, patches, generator=random) < 0.3
    tensors = {
        "globals": pixels(crops.num_global, crops.global_size),
        "locals": pixels(crops.num_local, crops.local_size),
        "masks": masks.to(device),
    }
    return BlockTensors(step, 0, 1.0, tensors)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _peak(name: str) -> float | None:
    return next((peak for known, peak in _PEAKS.items() if all(word in name for word in known.split())), None)


def _line(row: Row) -> str:
    waits = f"  waits {row.waited_share:.1%}" if row.waited_share else ""
    mfu = "  –  " if row.mfu is None else f"{row.mfu:5.1%}"
    return (
        f"{row.model:<10} {row.arm:<22} batch {row.batch:<4} {row.images_per_s:8.1f} images/s  MFU {mfu}  "
        f"peak {row.peak_gib:5.1f} GiB, planned {row.planned_gib:5.1f}  loss {row.loss:.4f}{waits}"
    )


if __name__ == "__main__":
    main()
