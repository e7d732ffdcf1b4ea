"""Groups of real workers around a tiny DeepSpeed engine, forked from one process that has imported everything.

`python lab.py` reads one JSON line a group: `{"do": NAME, "world": W, "scratch": FOLDER, …}`. Each worker calls
the function NAME below and leaves its result, or its error, in `scratch`. The answer is a line of exit codes.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.byte_counts import BYTES
from orchestrator.config.schedules import Optimizer
from orchestrator.errors import UserError
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import fetch
from orchestrator.training import loop
from orchestrator.training.checkpoint import reader, shard_file, storage
from orchestrator.training.checkpoint.format import CheckpointError
from orchestrator.training.checkpoint.partition import gather
from orchestrator.training.checkpoint.reader import newest, restore
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.checkpoint.writer import CheckpointWriter
from orchestrator.training.engine import Engine, build_engine
from orchestrator.training.task import Modules
from orchestrator.training.zero import import_deepspeed

# Run as a script, its own folder is on the path; imported by a test, it is part of a package.
if __package__:
    from . import tuned, whole_stage
    from .worker import CLOCK, Recorder, make_job
else:
    import tuned
    import whole_stage
    from worker import CLOCK, Recorder, make_job

Spec = dict[str, Any]


class Odd(nn.Module):
    """Tensors of 35, 15, 2 and 1 elements: at five workers some shards are short and some empty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 5, bias=False)
        self.second = nn.Linear(5, 3, bias=False)
        self.two = nn.Parameter(torch.randn(2))
        self.one = nn.Parameter(torch.randn(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs))).sum() * self.one.sum() + self.two.prod()  # type: ignore[no-any-return]


def make_engine(spec: Spec) -> Engine:
    seed = spec.get("seed", 0)
    copies: dict[str, nn.Module] = {name: Odd(seed + 5) for name in spec.get("copies", ["gram"])}
    return build_engine(
        Modules(Odd(seed), ema=Odd(seed), copies=copies),
        Optimizer.model_validate(
            {"lr": {"peak": 1e-2, "warmup_steps": 0}, "clip_norm": spec.get("clip_norm", 30.0)}
        ),
        zero_stage=spec.get("zero", 3),
        precision="fp32",
        num_blocks=dist.get_world_size(),
    )


def train(engine: Engine, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        engine.backward(engine.modules.trainable(torch.randn(4, 7)))
        engine.step(1e-2, step, 0.04)
        engine.update_ema(0.9)


def everything(engine: Engine) -> dict[str, Tensor]:
    """All weights, whole, by the engine's own views; no checkpoint code has a part in it."""
    whole = {}
    for kind, shards in (
        ("master", engine.master()),
        ("exp_avg", engine.moments("exp_avg")),
        ("exp_avg_sq", engine.moments("exp_avg_sq")),
        *((f"copies.{name}", engine.read(module)) for name, module in engine.modules.copies.items()),
    ):
        for shard in shards:
            whole[f"{kind}/{shard.name}"] = gather(shard.data, shard.numel).clone()
            if kind == "master":
                whole[f"ema/{shard.name}"] = gather(engine.ema[shard.name], shard.numel).clone()
    return whole


def make_storage(spec: Spec) -> CheckpointStorage:
    folder = Path(spec["folder"])
    if spec.get("own_disks"):  # each worker on a machine of its own
        folder = folder / f"machine-{dist.get_rank()}"
    return (
        CheckpointStorage(folder, LocalStore(spec["store"]), "job/checkpoints")
        if spec.get("store")
        else CheckpointStorage(folder)
    )


def make_writer(spec: Spec, where: CheckpointStorage) -> CheckpointWriter:
    token = reader.share(where.acquire() if dist.get_rank() == 0 else None)
    return CheckpointWriter(
        where,
        token=token,
        keep=spec.get("keep", 2),
        keep_every=spec.get("keep_every"),
        meta={"job": "lab", "seed": 0},
    )


def save_now(writer: CheckpointWriter, engine: Engine, step: int) -> None:
    writer.begin(engine, step)
    writer.wait()
    dist.barrier()
    writer.commit()
    writer.finish()
    dist.barrier()


def agree(flag: bool) -> bool:
    flags = torch.tensor(float(flag))
    dist.all_reduce(flags, dist.ReduceOp.MIN)
    return bool(flags)


# --- what groups do -------------------------------------------------------------------------------------------


def save(spec: Spec) -> Any:
    """Train two steps, save as each of `steps`, and leave all weights in `truth` if given."""
    engine = make_engine(spec)
    train(engine, 2)
    writer = make_writer(spec, make_storage(spec))
    for step in spec["steps"]:
        save_now(writer, engine, step)
    whole = everything(engine)
    if dist.get_rank() == 0 and spec.get("truth"):
        save_file(whole, spec["truth"])
    return {"stall": writer.stall_s, "bytes": writer.last_bytes, "committed": writer.committed}


def load(spec: Spec) -> Any:
    """Restore the newest of each of `folders` into an engine with other weights; leave all in `results`."""
    steps = []
    for folder, result in zip(spec["folders"], spec["results"], strict=True):
        engine = make_engine({**spec, "seed": 3})
        where = make_storage({**spec, "folder": folder})
        found = newest(where, dist.get_rank(), dist.get_world_size(), agree)
        assert found is not None
        steps.append(restore(found, engine))
        whole = everything(engine)
        if dist.get_rank() == 0:
            save_file(whole, result)
    fetched = [path.relative_to(where.folder).as_posix() for path in where.folder.rglob("*.safetensors")]
    return {"steps": steps, "updates": engine.updates, "fetched": sorted(fetched)}


def job(spec: Spec) -> Any:
    """A whole job to its end or a stop, by the loop itself."""
    recorder = Recorder(spec.get("stop_after"), spec.get("die_at"), "spikes" in spec)
    try:
        with patch.object(loop, "time", CLOCK if spec.get("slow_look") else time):
            complete = loop.train(make_job(spec), recorder)
    except (UserError, loop.NonFiniteLossError) as error:
        if "spikes" not in spec:
            raise
        return {"error": str(error), "metrics": recorder.metrics}
    return {
        "complete": complete,
        "metrics": recorder.metrics,
        "held_out": recorder.held_out,
        "troubles": recorder.troubles,
    }


def handed(spec: Spec) -> Any:
    """A whole job, pickled as a driver sends it; its metrics, and what this worker read and wrote.

    The pickle comes through the pipe from the test, and from no file.
    """
    recorder = Recorder(None)
    os.environ.update(spec["env"])
    job = pickle.loads(base64.b64decode(spec["job"]))
    try:
        for needed in job.inputs:
            fetch(*needed)
        with patch.object(shard_file, "PART", spec["part_bytes"]):
            assert loop.train(job, recorder)
    except UserError as error:
        return {"mistake": [error.what, error.where, error.hint], "bytes": BYTES.take()}
    return {"metrics": recorder.metrics, "bytes": BYTES.take()}


def tune(spec: Spec) -> Any:
    """A whole `finetune` job."""
    recorder = Recorder(spec.get("stop_after"))
    complete = loop.train(tuned.make_job(spec), recorder)
    return {"complete": complete, "metrics": recorder.metrics, "held_out": recorder.held_out}


def stage(spec: Spec) -> Any:
    """A whole stage by its own `run`."""
    return whole_stage.stage(spec)


def student(spec: Spec) -> Any:
    """A student of a distillation; see there."""
    return whole_stage.student(spec)


def clip(spec: Spec) -> Any:
    """Three steps on other inputs in each worker, clipped hard; norms of each, and the weights in `truth`."""
    engine = make_engine(spec)
    norms = []
    for step in range(3):
        torch.manual_seed(100 * step + dist.get_rank())
        engine.backward(engine.modules.trainable(torch.randn(4, 7)))
        norms.append(engine.step(1e-2, step, 0.04))
    whole = everything(engine)
    if dist.get_rank() == 0:
        save_file(whole, spec["truth"])
    return norms


def find(spec: Spec) -> Any:
    """The step that `newest` agrees on."""
    found = newest(make_storage(spec), dist.get_rank(), dist.get_world_size(), agree)
    return found.step if found else None


def restore_other(spec: Spec) -> Any:
    """Try to restore what was saved with other copies or other tensors."""
    where = make_storage(spec)
    found = newest(where, dist.get_rank(), dist.get_world_size(), agree)
    assert found is not None
    engine = make_engine(spec)
    for key, numel in spec.get("pretend", {}).items():
        found.meta["keys"][key] = numel
    for key in spec.get("without", ()):
        del found.meta["keys"][key]
    return restore(found, engine)


def killed(spec: Spec) -> Any:
    """Save step 1, then die at point `at` while saving step 2."""
    engine = make_engine(spec)
    train(engine, 1)
    writer = make_writer(spec, make_storage(spec))
    save_now(writer, engine, 1)
    module, name, calls = {
        "data": (shard_file, "_pieces", 0),
        "sync": (shard_file.os, "fsync", 0),
        "part": (storage.CheckpointStorage, "put", 0),
        "manifest": (storage.os, "link", 0),
        "prune": (storage.CheckpointStorage, "_remove", 1),
    }[spec["at"]]
    _die_at(module, name, calls)
    save_now(writer, engine, 2)
    return "still here"


def _die_at(module: Any, name: str, calls: int) -> None:
    real: Callable[..., Any] = getattr(module, name)
    count = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if name == "_pieces":
            return _first_then_die(real(*args, **kwargs))
        count += 1
        if count > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, name, deadly)


def _first_then_die(pieces: Any) -> Any:
    yield next(pieces)
    os.kill(os.getpid(), signal.SIGKILL)


def full(spec: Spec) -> Any:
    """Save to a full disk, go on, and save again once there is room."""
    engine = make_engine(spec)
    train(engine, 1)
    where = make_storage(spec)
    writer = make_writer(spec, where)
    hog = where.folder / "hog"
    real = shutil.disk_usage
    if spec["inject"]:

        def usage(path: Any) -> Any:
            found = real(path)
            return type(found)(found.total, found.used, 17) if hog.exists() else found

        shard_file.shutil.disk_usage = usage  # type: ignore[assignment]
        hog.touch()
    else:
        hog.write_bytes(bytes(real(where.folder).free - 100))
    writer.begin(engine, 1)
    try:
        writer.wait()
        return "written"
    except CheckpointError as error:
        said, cause = str(error), type(error.__cause__).__name__
    dist.barrier()
    writer.drop()
    left = [path.name for path in where.folder.rglob("*.safetensors*")]
    hog.unlink(missing_ok=True)
    train(engine, 1)
    save_now(writer, engine, 2)
    return {"said": said, "cause": cause, "left": left, "committed": where.committed()}


def asynchronous(spec: Spec) -> Any:
    """Training goes on while a slow disk takes the file, and what is written is the step's state, not a later one."""
    engine = make_engine(spec)
    train(engine, 1)
    writer = make_writer(spec, make_storage(spec))
    save_now(writer, engine, 1)
    train(engine, 1)
    truth = everything(engine)
    if dist.get_rank() == 0:
        save_file(truth, spec["truth"])
    real = shard_file.write_file

    def slow(*args: Any) -> dict[str, Any]:
        time.sleep(1.0)
        return real(*args)

    shard_file.write_file = slow
    writer.begin(engine, 2)
    before = writer.written()
    train(engine, 3)
    during = writer.written()
    writer.wait()
    after = writer.written()
    dist.barrier()
    writer.commit()
    writer.finish()
    return {"written": [before, during, after], "stall": writer.last_stall_s, "write": writer.last_write_s}


def gone_store(spec: Spec) -> Any:
    """The store fails under worker 1's upload; the checkpoint before stays, and the next one works."""

    class Failing(LocalStore):
        def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
            if "step-00000002" in name and "shard-00002" in name:
                raise ConnectionError("the store is gone")
            super().put_file(name, source, consume=consume)

    engine = make_engine(spec)
    train(engine, 1)
    where = CheckpointStorage(make_storage(spec).folder, Failing(spec["store"]), "job/checkpoints")
    writer = make_writer(spec, where)
    save_now(writer, engine, 1)
    writer.begin(engine, 2)
    said = ""
    try:
        writer.wait()
    except CheckpointError as error:
        said = f"{type(error.__cause__).__name__}: {error}"
    dist.barrier()
    seen = where.committed()
    dist.barrier()
    writer.drop()
    save_now(writer, engine, 3)
    return {"said": said, "seen": seen, "committed": where.committed()}


def zombie(spec: Spec) -> Any:
    """A worker thought dead wakes up after a newer group has saved the same step, and tries to commit and prune."""
    engine = make_engine(spec)
    train(engine, 1)
    where = make_storage(spec)
    old = make_writer({**spec, "keep": 1}, where)
    save_now(old, engine, 1)
    old.begin(engine, 2)
    old.wait()
    new = make_writer(spec, where)
    save_now(new, engine, 2)
    old.commit()
    try:
        old.finish()
        said = "committed"
    except CheckpointError as error:
        said = str(error)
    return {"said": said, "tokens": {step: where.find(step).token for step in where.committed()}}


def run_group(spec: Spec) -> list[int]:
    world, scratch = spec["world"], Path(spec["scratch"])
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _worker(spec, rank, world, scratch)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _worker(spec: Spec, rank: int, world: int, scratch: Path) -> NoReturn:
    log = os.open(scratch / f"log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(200)  # nothing here may hang for ever
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world
        )
        import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
        try:
            result = {"result": globals()[spec["do"]](spec)}
        except CheckpointError as error:
            result = {"error": str(error)}
        (scratch / f"result-{rank}").write_text(json.dumps(result))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    import_deepspeed()
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first optimizer imports seconds' worth of torch
    gc.freeze()  # DeepSpeed collects garbage at each start: in forked workers that copies every page
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(run_group(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
