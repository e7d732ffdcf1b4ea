"""The parts of a pipeline file that every layer may know: frozen pydantic models, no behaviour.

Fields made with :func:`operational` say *how* something runs (worker counts, checkpoint intervals), never
*what* comes out. They are left out of a stage's key, so changing one re-runs nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

# Where a field of a config says no bounds of its own. Counts fit into 32 bits, other whole
# numbers into 64, and fractions into float32.
MAX_COUNT = 2**31 - 1
MAX_WIDTH = 2**20
MAX_DEPTH = 4096
# Of draws, or of steps: shares are exact over cycles of up to a million.
MIN_SHARE = 1e-6
_INT_RANGE = (-(2**63), 2**63 - 1)
_FLOAT_RANGE = (-1e30, 1e30)


class _NoBoolean:
    """Refuses booleans where numbers belong: Python's are integers, so pydantic takes them for 0 and 1."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, bool):
            return value
        match self._schema["type"]:
            case "int":
                raise PydanticKnownError("int_type")
            case "float":
                raise PydanticKnownError("float_type")
        expected = " or ".join(map(str, self._schema["expected"]))
        raise PydanticKnownError("literal_error", {"expected": expected})


def _takes_numbers(schema: Mapping[str, Any]) -> bool:
    if schema.get("type") == "literal":
        kinds = set(map(type, schema["expected"]))
        return bool(kinds & {int, float}) and bool not in kinds
    return schema.get("type") in ("int", "float")


def _bound(schema: Any) -> None:
    """Give every number below a core schema the bounds that it does not have, and refuse booleans; in place."""
    if isinstance(schema, (list, tuple)):
        for item in schema:
            _bound(item)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "function-before" and isinstance(schema["function"]["function"], _NoBoolean):
        return  # in a section that had its turn
    if schema.get("type") in ("int", "float"):
        if schema["type"] == "float":
            schema["allow_inf_nan"] = False
        low, high = _INT_RANGE if schema["type"] == "int" else _FLOAT_RANGE
        lowest: Any = schema.get("ge", schema.get("gt", -1))
        if schema["type"] == "int" and lowest >= 0:
            high = MAX_COUNT
        if "ge" not in schema and "gt" not in schema:
            schema["ge"] = low
        if "le" not in schema and "lt" not in schema:
            schema["le"] = high
    if _takes_numbers(schema):
        inside: Any = dict(schema)
        schema.clear()
        schema.update(core_schema.no_info_before_validator_function(_NoBoolean(inside), inside))
        return
    for name, inner in schema.items():
        # What is in `metadata` or a default is no schema.
        if name in (
            "schema",
            "fields",
            "items_schema",
            "choices",
            "keys_schema",
            "values_schema",
            "definitions",
        ):
            _bound(
                list(inner.values()) if name in ("fields", "choices") and isinstance(inner, dict) else inner
            )


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def identity(self) -> dict[str, Any]:
        """What decides the result: every field that is not operational, as plain JSON types, recursively."""
        identity: dict[str, Any] = _identity(self)
        return identity


class Settings(Strict):
    """What users write: every number in it, at any depth, is finite and has bounds, its field's own or these here.

    `true` and `false` are no numbers.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The model's schema, with bounds for every number in it, and without booleans for numbers."""
        schema = handler(source)
        _bound(schema)
        return schema


def operational(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that changes how a stage runs and never what it produces."""
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def in_key_if_set(default: Any, **kwargs: Any) -> Any:
    """A pydantic field that came later: with its default, results and keys are those from before it was there."""
    return Field(default, json_schema_extra={"in_key_if_set": True}, **kwargs)


def _identity(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {
            name: _identity(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if _decides(field, getattr(value, name))
        }
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _decides(field: FieldInfo, value: Any) -> bool:
    """Whether a field with this value has a part in what comes out."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return not extra.get("operational") and not (extra.get("in_key_if_set") and value == field.default)


# The upper end of a worker range that has none: as many workers as the cluster has devices.
EVERY_DEVICE = 2**20
_AUTO = "auto"
_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_LABEL = re.compile(r"!?(in\([^()]+\)|[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)")
# What Ray 2.60 knows, but for what only Ray itself sets.
_RUNTIME_ENV = (
    "conda",
    "config",
    "container",
    "env_vars",
    "excludes",
    "image_uri",
    "java_jars",
    "pip",
    "py_executable",
    "py_modules",
    "uv",
    "worker_process_setup_hook",
    "working_dir",
)
# Key of old → key of today.
RENAMED = {"silence_s": "heartbeat_timeout_s", "hang_s": "stall_timeout_s"}


def _worker_range(value: Any) -> Any:
    if value == _AUTO:
        return (1, EVERY_DEVICE)
    if isinstance(value, (str, bool)):
        raise ValueError(f"must be a number, two numbers such as [1, 4], or auto, not {value!r}")
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[1] == _AUTO:
        return (value[0], EVERY_DEVICE)
    return (value, value) if isinstance(value, int) else value


def _worker_text(value: tuple[int, int]) -> Any:
    if value[1] != EVERY_DEVICE:
        return value
    return _AUTO if value[0] == 1 else (value[0], _AUTO)


# min_workers and max_workers. `auto`, or `[2, auto]`, has EVERY_DEVICE as its upper end.
Workers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=EVERY_DEVICE)], Annotated[int, Field(ge=1, le=EVERY_DEVICE)]],
    BeforeValidator(
        _worker_range, json_schema_input_type=int | Literal["auto"] | tuple[int, int | Literal["auto"]]
    ),
    PlainSerializer(_worker_text),
]


def _amount(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"must be a whole number, or a share below 1, not {value:g}")
    return value


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if number is None or number[2].upper() not in _BYTES:
        raise ValueError(f"must be a number of bytes, or a text such as 8GiB or 500MB, not {value!r}")
    return int(float(number[1]) * _BYTES[number[2].upper()])


class Resources(Settings):
    """The resources that each worker requests from Ray. No stage runs again when a key here changes."""

    gpu: float | None = operational(
        None,
        gt=0,
        le=1024,
        description="The number of GPUs per worker: a whole number, or a fraction below 1 so that several workers "
        "share one GPU. Default: 1 if workers run on GPUs, else 0.",
    )
    cpu: float | None = operational(
        None,
        gt=0,
        le=65536,
        description="The number of logical CPUs that each worker reserves: a whole number, or a fraction below 1. "
        "Default: 1 if workers run on CPUs, 0 if they run on GPUs.",
    )
    memory: (
        Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(gt=0, le=2**50)]
        | None
    ) = operational(
        None,
        description="The main memory that each worker reserves, in bytes or as a text such as 8GiB. Ray uses it for "
        "placement only and does not enforce it. Default: none is reserved.",
    )
    accelerator_type: str | None = operational(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$",
        description="The type of accelerator that a worker's node must have, by Ray's name for it, such as H100 or "
        "A100-80G. Default: any type.",
    )
    labels: dict[str, str] = operational(
        {},
        description="Ray's label selector: workers run only on nodes with these labels. A value may be negated "
        "(`!spot`) or a list of choices (`in(a,b)`). Default: workers run on any node.",
    )
    runtime_env: dict[str, Any] = operational(
        {},
        repr=False,
        description="Ray's runtime environment for worker processes, with keys such as `env_vars`, `pip` or "
        "`working_dir`.",
    )

    @field_validator("gpu", "cpu")
    @classmethod
    def _whole_or_share(cls, value: float | None) -> float | None:
        return value if value is None else _amount(value)

    @field_validator("labels")
    @classmethod
    def _selects(cls, labels: dict[str, str]) -> dict[str, str]:
        for name, value in labels.items():
            if not _LABEL.fullmatch(value):
                raise ValueError(f"{name}: {value!r} is not a label's value, !value, in(a,b) or !in(a,b)")
        return labels

    @field_validator("runtime_env", mode="before")
    @classmethod
    def _known(cls, env: Any) -> Any:
        """Only the names of keys are shown: values may be secret."""
        if not isinstance(env, Mapping):
            return env
        for name in env:
            if name not in _RUNTIME_ENV:
                known = ", ".join(_RUNTIME_ENV)
                raise ValueError(f"unknown key {name!r} of a runtime environment; Ray knows {known}")
        if "env_vars" not in env:
            return env
        variables = env["env_vars"]
        if not isinstance(variables, Mapping):
            raise ValueError("env_vars must be a mapping of names to texts")
        for name, value in variables.items():
            # YAML makes numbers of ports and the like.
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise ValueError(f"env_vars.{name} must be a text: put it in quotes")
        return {**env, "env_vars": {str(name): str(value) for name, value in variables.items()}}

    @field_serializer("runtime_env")
    def _without_secrets(self, env: dict[str, Any], info: SerializationInfo) -> dict[str, Any]:
        """JSON goes into records, logs and MLflow; the values of `env_vars` do not."""
        if info.mode != "json" or "env_vars" not in env:
            return env
        return {**env, "env_vars": dict.fromkeys(env["env_vars"], "***")}

    def overlaid(self, own: Resources | None) -> Resources:
        """These, with what `own` says itself laid over them, key by key."""
        if own is None:
            return self
        return self.model_copy(update={name: getattr(own, name) for name in own.model_fields_set})


class Elastic(Settings):
    """How training stages use machines that come and go. No stage runs again when a key here changes."""

    workers: Workers = operational(
        (1, 2),
        description="The number of workers of a job: [min_workers, max_workers], one number for a fixed size, or auto "
        "for one worker per device that the cluster has at the time.",
    )
    resources: Resources = operational(
        Resources(),
        description="The resources that each worker requests from Ray: GPUs, CPUs, memory and type of node.",
    )
    checkpoint_every_s: float | None = operational(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The time between checkpoints, in seconds. Default: computed from the measured cost of a "
        "checkpoint and from how often workers were lost, between 2 s and 10 min.",
    )
    keep_checkpoints: int = operational(
        2, ge=1, description="The number of latest checkpoints to keep. Older ones are deleted."
    )
    keep_every: int | None = operational(
        None,
        ge=1,
        description="The interval of checkpoints that are never deleted, in steps: those at multiples of this "
        "number are kept. Default: none.",
    )
    device: Literal["auto", "cpu", "gpu"] = operational(
        "auto",
        description="The type of device that workers train on. auto uses GPUs if the cluster has any when the stage "
        "starts, else CPUs. cpu uses CPUs even if there are GPUs. gpu requires GPUs.",
    )
    resize_share: float = operational(
        0.1,
        gt=0,
        le=1,
        description="The maximum share of training time, from 0 to 1, that may be spent on restarts whose only "
        "purpose is to add workers.",
    )
    heartbeat_timeout_s: float = operational(
        15.0,
        gt=1,
        allow_inf_nan=False,
        description="The time without a heartbeat after which a worker is replaced, in seconds.",
    )
    stall_timeout_s: float = operational(
        300.0,
        gt=1,
        allow_inf_nan=False,
        description="The time without a finished step after which the worker group is restarted, in seconds.",
    )
    max_failures: int = operational(
        3,
        ge=0,
        description="The maximum number of errors in the training code that are retried before the stage fails. The "
        "same error twice at the same step is not retried. Lost machines do not count.",
    )
    max_skipped_updates: int = operational(
        10,
        ge=0,
        le=1000,
        description="The maximum number of updates that may be skipped because a gradient is not finite, within a "
        "window of 100 times as many steps. One more fails the stage, and the error names the steps and samples. "
        "With 10, the stage fails after 11 skipped updates within the last 1,000 steps.",
    )
    wait_for_workers_s: float | None = operational(
        None,
        gt=0,
        allow_inf_nan=False,
        description="The time that a job waits for enough machines before it fails, in seconds. Default: no limit.",
    )
    exact: bool = operational(
        False,
        description="Whether gradients are summed in float64, so that the weights are bit-identical for any number "
        "of workers. Gradients then take twice the memory and the network traffic. Requires `zero_stage: 3`.",
    )
    workers_from: Literal["warm", "stock"] = operational(
        "warm",
        description="The worker group that Ray Train uses. warm: processes that have all modules imported and are "
        "reused between attempts. stock: Ray Train's own worker group, which starts new processes for each attempt.",
    )
    ray_train_callbacks: tuple[str, ...] = operational(
        (),
        description="The Ray Train callbacks of each run, as package.module:Class. Classes are instantiated without "
        "arguments.",
    )

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, values: Any) -> Any:
        """Keys as they were called before; `load` says so once."""
        if not isinstance(values, Mapping):
            return values
        renamed = dict(values)
        for old, new in RENAMED.items():
            if old in renamed:
                if new in renamed:
                    raise ValueError(f"{old} is the old name of {new}: leave it out")
                renamed[new] = renamed.pop(old)
        return renamed

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.workers[0] > self.workers[1]:
            raise ValueError(f"min_workers ({self.workers[0]}) is above max_workers ({self.workers[1]})")
        return self

    @property
    def every_device(self) -> bool:
        """Whether `workers` has no upper end but the devices that are there."""
        return self.workers[1] == EVERY_DEVICE

    def overlaid(self, own: Elastic | None) -> Elastic:
        """This section, with what `own` says itself laid over it; `resources` key by key."""
        if own is None:
            return self
        update = {name: getattr(own, name) for name in own.model_fields_set}
        if "resources" in update:
            update["resources"] = self.resources.overlaid(own.resources)
        return self.model_copy(update=update)


def _usable_path(path: Path) -> Path:
    text = str(path)
    if "\0" in text:
        raise ValueError("must be a path without NUL characters")
    if len(os.fsencode(text)) > 4096 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("must be a path of at most 4096 bytes, with names of at most 255")
    return path


# A path on this machine that a file system could have.
LocalPath = Annotated[Path, AfterValidator(_usable_path)]

# 108-megapixel telephones and 102-megapixel cameras are below it.
MAX_PIXELS = 120_000_000


class DataSource(Settings):
    """A folder of images, with an optional table of captions and labels."""

    path: LocalPath = Field(description="The folder of images. Subfolders are searched, too.")
    captions: LocalPath | None = Field(
        None,
        description="A CSV file with a `file` column and, optionally, `caption` and `label` columns. Default: images "
        "have no captions or labels.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=2**31 - 1,
        description="The maximum width × height of an image, in pixels. Larger images are left out. The size is read "
        "from the file's header, before the image is decoded.",
    )


class Tracking(Settings):
    """Where MLflow keeps runs and the registry."""

    uri: str = Field("sqlite:///runs/mlflow.db", description="The address of the MLflow server or database.")
    experiment: str | None = Field(
        None, description="The MLflow experiment of the runs. Default: the pipeline's name."
    )


PreemptionNotices = Literal["auto", "aws", "gce", "azure", "kubernetes", "off"]


class Cluster(Settings):
    """The Ray cluster that the pipeline runs on."""

    address: str = Field(
        "local",
        description="The Ray cluster to use: `local` starts one on this machine for the run, `auto` joins the cluster "
        "that this machine is a node of, `host:port` joins the cluster with its head at that address.",
    )
    preemption_notices: PreemptionNotices = operational(
        "auto",
        description="The source of preemption notices, after which a machine's Ray node is drained. `auto` detects "
        "the cloud from each machine's firmware and polls its metadata service; on other machines nothing is polled. "
        "With `kubernetes` nothing is polled either: the pods' preStop hooks drain the nodes.",
    )
    dashboard: bool = operational(
        False,
        description="Whether a `local` cluster runs Ray's dashboard, which shows Ray Train runs and exports "
        "Prometheus metrics. Requires the package extra `dashboard`, which installs ray[default].",
    )

    @field_validator("address")
    @classmethod
    def _no_client(cls, address: str) -> str:
        if "://" in address:
            raise ValueError(
                f"{address!r} is not an address that a driver can run at: it needs a node of the cluster. "
                "Hand the pipeline to the cluster with `ray job submit -- orchestrator run …` and the address "
                "auto (docs/clusters.md)"
            )
        if not re.fullmatch(r"local|auto|[\w.\-]+:\d{1,5}", address):
            raise ValueError(f"must be local, auto or host:port, not {address!r}")
        return address


class Hardware(Settings):
    """The machines for which `orchestrator plan` estimates costs. It does not change how stages run."""

    devices: int = Field(ge=1, description="The number of accelerators that train at the same time.")
    name: str = Field("H100 SXM", description="The name of the accelerator, used only for display.")
    peak_tflops: float = Field(
        989.0,
        gt=0,
        description="The dense bf16 peak of one accelerator, in TFLOP/s (10¹² operations per second).",
    )
    memory_gib: float = Field(80.0, gt=0, description="The memory of one accelerator, in GiB.")
    mfu: float = Field(
        0.4,
        gt=0,
        le=1,
        description="The model FLOPs utilization: the share of the peak that training reaches while it computes, "
        "above 0 and at most 1.",
    )
    mfu_source: Literal["assumed", "measured", "fitted"] = Field(
        "assumed",
        description="The origin of `mfu`. fitted means that it was chosen to reproduce published hours, and `plan` "
        "then says that its hours are not a prediction.",
    )
    collective_gb_s: float | None = Field(
        None,
        gt=0,
        description="The bandwidth of collective operations per accelerator, in GB/s (10⁹ bytes per second), while "
        "all accelerators communicate. Default: communication time is not counted.",
    )
    input_images_s: float | None = Field(
        None,
        gt=0,
        description="The number of images per second that the CPUs of one accelerator decode and crop. Default: the "
        "time for input data is not counted.",
    )


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[str, ...], BeforeValidator(_one_or_many, json_schema_input_type=str | tuple[str, ...])
]


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _mix(value: Any) -> Any:
    """One name, a list of names, or weights by name; a list without repeats, in one order."""
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(sorted(set(names)))
    if not isinstance(names, Mapping) or not names:
        raise ValueError("mix must be a name, a list of names, or a mapping of names to weights")
    names = {name: _number(weight) for name, weight in names.items()}
    for name, weight in names.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name!r} must be a number above 0, not {weight!r}")
    total = sum(names.values())
    for name, weight in names.items():
        # A sum that is infinite has weights that are out of bounds, which is said elsewhere.
        if weight / total < MIN_SHARE and total < math.inf:
            raise ValueError(
                f"the weight of {name!r} is {weight / total:.3g} of all weights: give it {MIN_SHARE * total:.3g} or "
                "more, one draw in a million, or leave it out"
            )
    return names


# Names of components and datasets, or their weights.
Mix = Annotated[
    tuple[str, ...] | dict[str, float],
    BeforeValidator(_mix, json_schema_input_type=str | tuple[str, ...] | dict[str, float]),
]


class StageSpec(Settings):
    """What every stage has. Subclasses narrow `kind` to a Literal and add their own fields."""

    kind: str = Field(
        description="The kind of the stage, such as `pretrain`. It decides which keys the stage has."
    )
    needs: Names = Field(
        (), description="The stages whose artifacts this stage reads, as one name or a list."
    )


class Schedule(Settings):
    """A value that changes with the step: a warmup from `start` to `peak`, a hold, then constant or on to `end`.

    During the first `warmup_steps` steps the value goes from `start` to `peak`, in a line or by half a cosine. It
    then stays at `peak` for `hold_steps` steps. With shape `constant` it stays at `peak` until the end. With `cosine`
    or `linear` it goes from `peak` to `end`, by half a cosine or in a line, over the rest of the run; `end` may be
    higher than `peak`.
    """

    peak: float = Field(ge=0, description="The value after the warmup.")
    start: float = Field(
        0.0, ge=0, description="The value at step 0. It is used only if `warmup_steps` is above 0."
    )
    end: float = Field(
        0.0, ge=0, description="The value after the last step. It is not used with shape `constant`."
    )
    warmup_steps: int = Field(
        0, ge=0, description="The number of steps in which the value goes from `start` to `peak`."
    )
    warmup_shape: Literal["linear", "cosine"] = Field(
        "linear", description="The shape of the warmup from `start` to `peak`: a line, or half a cosine."
    )
    hold_steps: int = Field(
        0,
        ge=0,
        description="The number of steps after the warmup for which the value stays at `peak` before it moves to "
        "`end`.",
    )
    shape: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="The shape after warmup and hold: constant stays at `peak`, cosine and linear go to `end` over "
        "the rest of the run.",
    )

    def at(self, step: int, num_steps: int) -> float:
        """The value at `step` (0-based) of a run of `num_steps`."""
        if step < self.warmup_steps:
            if self.warmup_shape == "cosine":
                return _half_cosine(self.start, self.peak, step / self.warmup_steps)
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        falls_from = self.warmup_steps + self.hold_steps
        done = min(1.0, max(0, step - falls_from) / max(1, num_steps - falls_from))
        if self.shape == "linear":
            return self.peak + (self.end - self.peak) * done
        return _half_cosine(self.peak, self.end, done)


def _half_cosine(first: float, last: float, done: float) -> float:
    """From `first` (done = 0) to `last` (done = 1), level at both ends."""
    return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))


def _constant(value: Any) -> Any:
    return {"peak": value} if isinstance(value, (int, float)) else value


# A schedule; a number is one that stays.
Decay = Annotated[Schedule, BeforeValidator(_constant, json_schema_input_type=float | Schedule)]


def _at_most_one(schedule: Schedule) -> Schedule:
    for name in ("start", "peak", "end"):
        if getattr(schedule, name) > 1:
            raise ValueError(
                f"{name} is {getattr(schedule, name):g}: a share of the average that is kept is at most 1"
            )
    return schedule


def _above_zero(schedule: Schedule) -> Schedule:
    used = {"peak": True, "start": schedule.warmup_steps > 0, "end": schedule.shape != "constant"}
    for name in [name for name, is_used in used.items() if is_used]:
        if getattr(schedule, name) <= 0:
            raise ValueError(f"{name} is 0, by which logits would be divided: give a number above 0")
    return schedule


# A schedule of an exponential moving average's momentum, from 0 to 1.
Momentum = Annotated[Schedule, AfterValidator(_at_most_one)]
# A schedule of a temperature: above 0 at every step.
Temperature = Annotated[Schedule, AfterValidator(_above_zero)]
# An exponential moving average's factor of the optimiser.
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def check_warmup(name: str, schedule: Schedule, steps: int) -> None:
    """Raises ValueError if a schedule would never reach its peak."""
    if schedule.warmup_steps > steps:
        raise ValueError(
            f"{name}.warmup_steps is {schedule.warmup_steps}, more than the {steps} steps there are: the peak is never "
            "reached"
        )


def check_ratio(name: str, ratio: tuple[float, float]) -> None:
    """Raises ValueError unless the smaller one is first."""
    if ratio[0] > ratio[1]:
        raise ValueError(f"{name} is {ratio[0]:g} to {ratio[1]:g}: give the smaller first")


class Optimizer(Settings):
    """AdamW and its schedules, with the defaults of the DINOv3 recipe (arXiv 2508.10104 and its published code)."""

    lr: Schedule = Field(
        description="The learning rate by step. It is used as given and is not scaled by the batch size."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="The decay rates of AdamW's two moments.")
    weight_decay: Decay = Field(
        Schedule(peak=0.04),
        description="AdamW's decoupled weight decay by step. Vectors and scalars are not decayed.",
    )
    clip_norm: float | None = Field(
        30.0,
        gt=0,
        description="The maximum gradient norm of each submodule (the backbone, each head). Larger gradients are "
        "scaled down to it; null turns clipping off.",
    )
    layer_decay: float = Field(
        0.98,
        gt=0,
        le=1,
        description="The layer-wise learning rate decay: the factor on the learning rate for each layer further from "
        "the output. 1 turns it off.",
    )
    patch_embed_scale: float = Field(
        0.2, gt=0, description="An extra factor on the learning rate of the patch embedding. 1 turns it off."
    )


S = TypeVar("S", bound=StageSpec)


class Pipeline(Settings, Generic[S]):
    """A whole pipeline file, parametrised by the union of stage configs."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9\-]*$",
        max_length=100,
        description="The name of the pipeline in the ledger, in MLflow and in the names of published models: at most "
        "100 lowercase letters, digits and hyphens.",
    )
    seed: int = Field(0, description="The seed of all random numbers in all stages.")
    store: str = operational(
        "runs/",
        description="The store of artifacts, checkpoints and the ledger: a folder, or `s3://bucket/prefix`.",
    )
    tracking: Tracking = operational(
        Tracking(), description="The MLflow server or database that keeps runs and the model registry."
    )
    cluster: Cluster = operational(Cluster(), description="The Ray cluster that the pipeline runs on.")
    elastic: Elastic = operational(
        Elastic(),
        description="How training stages use machines that come and go. A stage can override it key by key.",
    )
    hardware: Hardware | None = operational(
        None,
        description="The machines for which `orchestrator plan` estimates costs. Default: no costs are printed.",
    )
    data: dict[str, DataSource] = Field({}, description="The datasets by name.")
    stages: dict[str, S] = Field(description="The stages by name. Their order in the file does not matter.")
