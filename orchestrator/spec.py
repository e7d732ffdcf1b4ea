"""The parts of a pipeline file that every layer may know: frozen pydantic models, no behaviour.

Fields made with :func:`operational` say *how* something runs (worker counts, checkpoint intervals), never
*what* comes out. They are left out of a stage's key, so changing one re-runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def identity(self) -> dict[str, Any]:
        """What decides the result: every field that is not operational, as plain JSON types, recursively."""
        identity: dict[str, Any] = _identity(self)
        return identity


def operational(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that changes how a stage runs and never what it produces."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational"))
        }
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _worker_range(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


Workers = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_worker_range),
]


class Elastic(Strict):
    """Defaults of every training stage; all of it operational."""

    workers: Workers = operational((1, 2), description="fewest and most workers; one number fixes the count")
    checkpoint_every_s: float | None = operational(
        None, gt=0, description="seconds between checkpoints; default: from their cost and the losses seen"
    )
    keep_checkpoints: int = operational(2, ge=1, description="newest checkpoints kept on disk")
    keep_every: int | None = operational(None, ge=1, description="checkpoints of every so many steps stay")
    device: Literal["auto", "cpu", "gpu"] = operational(
        "auto", description="what a worker takes; auto: a GPU if the cluster has one when the stage starts"
    )
    resize_share: float = operational(
        0.1,
        gt=0,
        le=1,
        description="the most of the time that may go into restarts just to use more machines",
    )
    silence_s: float = operational(15.0, gt=1, description="a worker not heard of for so long is given up")
    hang_s: float = operational(300.0, gt=1, description="a group without progress for so long is restarted")
    max_failures: int = operational(
        3, ge=0, description="failures of the user's code before a stage gives up"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.workers[0] > self.workers[1]:
            raise ValueError(f"the fewest workers ({self.workers[0]}) exceed the most ({self.workers[1]})")
        return self


class DataSource(Strict):
    """A folder of images. `captions` is a CSV with a `file` column and, as there are, `caption` and `label`."""

    path: Path
    captions: Path | None = None


class Tracking(Strict):
    """Where MLflow keeps runs and the registry."""

    uri: str = "sqlite:///runs/mlflow.db"
    experiment: str | None = Field(None, description="default: the pipeline's name")


PreemptionNotices = Literal["auto", "aws", "gce", "azure", "kubernetes", "off"]


class Cluster(Strict):
    """Which Ray cluster: `local` starts an own one, `auto` joins the running one, `ray://…` a remote one."""

    address: str = Field("local", pattern=r"^(local|auto|ray://.+|[\w.\-]+:\d+)$")
    preemption_notices: PreemptionNotices = operational(
        "auto",
        description="Whose notice that a machine is taken back is turned into the drain of its Ray node. `auto` asks "
        "the metadata service of the cloud that a machine's firmware names, and nobody on other machines. "
        "`kubernetes` asks nobody, since the pods' own preStop hooks drain.",
    )


class Hardware(Strict):
    """The machines that `orchestrator plan` reckons with; nothing runs differently for it."""

    devices: int = Field(ge=1, description="accelerators that train at once")
    name: str = Field("H100 SXM", description="for people")
    peak_tflops: float = Field(989.0, gt=0, description="dense bf16 operations a second of one, in 10¹²")
    memory_gib: float = Field(80.0, gt=0, description="of one")
    mfu: float = Field(0.4, gt=0, le=1, description="share of the peak that training reaches")


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]


class StageSpec(Strict):
    """What every stage has. Subclasses narrow `kind` to a Literal and add their own fields."""

    kind: str
    needs: Names = ()


class Schedule(Strict):
    """A schedule as data: linear warmup from `start` to `peak`, a hold, then constant or down to `end`.

    Values by step: `start + (peak-start)·t/warmup_steps` for t < warmup_steps; `peak` for the `hold_steps` after
    that and, with shape `constant`, to the end; with `cosine` or `linear` a half cosine or a line from `peak` to
    `end` over the rest of the run.
    """

    peak: float
    start: float = 0.0
    end: float = 0.0
    warmup_steps: int = Field(0, ge=0)
    hold_steps: int = Field(0, ge=0, description="at the peak, before it falls")
    shape: Literal["constant", "cosine", "linear"] = "constant"

    def at(self, step: int, num_steps: int) -> float:
        """The value at `step` (0-based) of a run of `num_steps`."""
        import math

        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        falls_from = self.warmup_steps + self.hold_steps
        done = min(1.0, max(0, step - falls_from) / max(1, num_steps - falls_from))
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * done
        return self.end + (self.peak - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


class Optimizer(Strict):
    """AdamW and its schedule. `lr.peak` is the effective rate; nothing is rescaled behind the user's back."""

    lr: Schedule
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.04, ge=0)
    clip_norm: float = Field(
        30.0, gt=0, description="largest norm of each submodule's gradient: backbone, heads"
    )
    layer_decay: float = Field(0.98, gt=0, le=1, description="factor on the rate for each layer further down")
    patch_embed_scale: float = Field(0.2, gt=0, description="extra factor on the patch embedding's rate")


S = TypeVar("S", bound=StageSpec)


class Pipeline(Strict, Generic[S]):
    """A whole pipeline file, parametrised by the union of stage configs."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9\-]*$")
    seed: int = 0
    store: str = operational("runs/")
    tracking: Tracking = operational(Tracking())
    cluster: Cluster = operational(Cluster())
    elastic: Elastic = operational(Elastic())
    hardware: Hardware | None = operational(None)
    data: dict[str, DataSource] = {}
    stages: dict[str, S]
