"""Toy stages: they need no Ray, leave traces of their attempts, and can be told to wait or to fail."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from orchestrator.config.elastic import Elastic
from orchestrator.config.settings import Strict, operational
from orchestrator.errors import Stopped, UserError
from orchestrator.stages.base import Context, Input, Stage

log = logging.getLogger("orchestrator.toys")


class Optim(Strict):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class Toy(Stage):
    """`ticks` waits of 20 ms each, one metric per tick, a count of ticks in the work folder and what keeps it.

    A file `hold-30` in the folder TOY_HOLDS holds tick 30 up until the file is removed.
    """

    needs_ray: ClassVar[bool] = False
    outputs: ClassVar[Mapping[str, str]] = {"result.json": "what came out"}

    ticks: int = Field(1, ge=0)
    optim: Optim = Optim()
    mode: Literal["fine", "fail", "mistake", "forget", "stubborn", "leak"] = operational("fine")
    checkpoint_every: int = operational(1, ge=1)

    def run(self, context: Context) -> Mapping[str, float]:
        ticked = context.work / "ticks"
        if context.remote and not ticked.exists():
            store, prefix = context.remote
            with contextlib.suppress(FileNotFoundError):
                store.get_file(prefix + "ticks", ticked)
        start = int(ticked.read_text()) if ticked.exists() else 0
        with (context.work / "attempts").open("a") as file:
            file.write(f"{os.getpid()} {start}\n")
        if trace := os.environ.get("TOY_TRACE"):
            with Path(trace).open("a") as file:
                file.write(f"{context.name} {start} {context.run.run_id}\n")
        for tick in range(start, self.ticks):
            time.sleep(0.02)
            while (hold := os.environ.get("TOY_HOLDS")) and Path(hold, f"hold-{tick}").exists():
                time.sleep(0.02)
            if context.stop.is_set() and self.mode != "stubborn":
                raise Stopped
            context.run.metrics({"loss": 1.0 / (tick + 1)}, tick)
            log.info("tick %d of %d", tick + 1, self.ticks)
            draft = ticked.with_suffix(".draft")
            draft.write_text(str(tick + 1))
            draft.replace(ticked)
            if context.remote:
                store, prefix = context.remote
                store.put_file(prefix + "ticks", ticked)
        if self.mode == "fail":
            raise RuntimeError("the toy broke")
        if self.mode == "leak":
            leak = os.environ["TOY_LEAK"]
            log.warning("told the log: %s", leak)
            context.run.tags({"told.tag": leak})
            context.run.params({"told": {"param": [leak]}})
            raise RuntimeError(f"told the error: {leak}")
        if self.mode == "mistake":
            raise UserError("the toy does not fit", where="toy box", hint="use another box")
        if self.mode != "forget":
            for item in context.inputs.values():
                assert (item.path / "result.json").is_file(), "what a stage reads is on its machine"
            text = json.dumps({role: item.key for role, item in context.inputs.items()})
            (context.out / "result.json").write_text(text)
        return {"loss": 1.0 / max(1, self.ticks), "ticks": float(self.ticks)}


class Curate(Toy):
    kind: Literal["curate"]
    data: str | None = None


class Pretrain(Toy):
    kind: Literal["pretrain"]
    elastic: Elastic | None = operational(None)
    inputs: ClassVar[tuple[Input, ...]] = (Input("index", ("curate",)),)


class Evaluate(Toy):
    kind: Literal["evaluate"]
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("model", ("pretrain",)),
        Input("index", ("curate",), required=False),
    )


class Publish(Toy):
    """Puts the pipeline's name and its own `says` into a file outside the store."""

    kind: Literal["publish"]
    outside: Path
    says: str = "hello"
    effects: ClassVar[bool] = True
    inputs: ClassVar[tuple[Input, ...]] = (Input("model", ("pretrain",)),)

    def drift(self, context: Context, tracking_uri: str) -> list[str]:
        if self.outside.is_dir():
            raise UserError("the outside does not answer")
        known = self.outside.read_text() if self.outside.exists() else ""
        wanted = f"{context.pipeline} {tracking_uri} {self.says}"
        return [] if known == wanted else [f"{self.outside} says {known!r}"]

    def run(self, context: Context) -> Mapping[str, float]:
        figures = super().run(context)
        uri = context.run.tracking_uri or "sqlite:///runs/mlflow.db"
        self.outside.write_text(f"{context.pipeline} {uri} {self.says}")
        return figures


ToyStage = Annotated[Curate | Pretrain | Evaluate | Publish, Field(discriminator="kind")]
