"""What several kinds of stages have in their configs: models, heads and crops, and the checks of what fits together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from orchestrator.config.extension import Named
from orchestrator.config.pixels import PixelFormat
from orchestrator.config.settings import MAX_WIDTH, Settings, Strict, in_key_if_set
from orchestrator.data.views import CropConfig
from orchestrator.errors import KeyMistakeError
from orchestrator.models.configs import RGB, Config
from orchestrator.models.presets import PRESETS, preset
from orchestrator.slow_import import warn_if_slow
from orchestrator.stages.base import Context

INDEX_KINDS = ("curate",)
# Of a model's name: where more are listed, none of them is near.
_CLOSE = 2
BACKBONE_KINDS = ("pretrain", "gram_anchor", "high_res")
# Folders of a trained artifact that nobody reads who does not train on from its checkpoint.
UNREAD = ("checkpoint", "lineage")
# Of those whose workers read it: slices of the checkpoint, a snapshot to anchor to, a model. Snapshots are linked.
READ_BY_WORKERS = (*UNREAD, "model", "snapshots", "students")


def _known_model(name: str) -> str:
    if name not in PRESETS:
        with warn_if_slow(f"of the model {name}"):
            preset(name)
    return name


def _known_or_none(name: str | None) -> str | None:
    try:
        return name if name is None else _known_model(name)
    except ValueError as error:
        said, is_unknown = str(error), str(error).endswith("?")
        if not is_unknown:
            raise
        if said.count(" or ") > _CLOSE:
            said = f"unknown model {name!r}: `orchestrator models` lists those that there are."
        raise ValueError(
            f"{said} A network from elsewhere is given as module, timm or transformers"
        ) from None


A_MODEL = Named("models", ours=tuple(PRESETS))
ModelName = Annotated[str, AfterValidator(_known_model), A_MODEL]
# As one annotation, so that the field still has the mark of a model's name.
OptionalModelName = Annotated[str | None, AfterValidator(_known_or_none), A_MODEL]


def _free(overrides: dict[str, Any]) -> dict[str, Any]:
    if "drop_path" in overrides:
        raise ValueError("drop_path is a key beside model: leave it out of model_overrides")
    if "num_channels" in overrides:
        raise ValueError(
            "num_channels follows from `bands` of the data's `pixels`: leave it out of model_overrides"
        )
    return overrides


def with_channels(overrides: Mapping[str, Any], num_channels: int) -> dict[str, Any]:
    """Overrides of a model that sees pictures of so many channels; of three as the pipeline file has them."""
    others = {name: value for name, value in overrides.items() if name != "num_channels"}
    return others if num_channels == RGB else {**others, "num_channels": num_channels}


# Fields of a preset by name, with the values that replace the preset's.
Overrides = Annotated[dict[str, Any], AfterValidator(_free)]
OVERRIDES = (
    "Values that replace fields of the model's preset, such as patch_size, num_storage_tokens, rope_rescale, norm_eps "
    "or key_bias (docs/models.md). The published model has them, too."
)


KoLeoViews = Literal["first", "both"]
Precision = Literal["auto", "fp32", "bf16"]
PRECISION: Precision = Field(
    "auto", description="The training precision. auto is bf16 on GPUs that support it, else fp32."
)


class Heads(Settings):
    """Sizes of the DINO and iBOT heads (arXiv 2508.10104, appendix C).

    The defaults are for small models on a laptop. The files in `conf/paper` have the published sizes.
    """

    hidden: int = Field(
        256,
        ge=1,
        le=MAX_WIDTH,
        description="The width of the hidden layers of both heads (DINOv3's 7B: 8192, but 4096 in the iBOT head of its "
        "published code).",
    )
    dino_bottleneck: int = Field(
        64, ge=1, le=MAX_WIDTH, description="The width of the DINO head's bottleneck (DINOv3's 7B: 512)."
    )
    dino_prototypes: int = Field(
        1024,
        ge=2,
        le=2**24,
        description="The number of prototypes of the DINO head (DINOv3's 7B: 262,144).",
    )
    ibot_bottleneck: int = Field(
        64, ge=1, le=MAX_WIDTH, description="The width of the iBOT head's bottleneck (DINOv3's 7B: 384)."
    )
    ibot_prototypes: int = Field(
        1024,
        ge=2,
        le=2**24,
        description="The number of prototypes of the iBOT head (DINOv3's 7B: 98,304).",
    )
    prototype_std: float = Field(
        0.02,
        gt=0,
        description="The standard deviation of the initial prototypes. With 1/√bottleneck they are close to unit "
        "vectors, as in DINO.",
    )


class ModelRecipe(Strict):
    """What it takes to rebuild a trained model; written beside its weights as `recipe.json`."""

    model: str
    model_overrides: dict[str, Any] = Field({})
    drop_path: float
    heads: Heads
    global_size: int
    pixels: PixelFormat | None = in_key_if_set(None)

    @property
    def tower(self) -> Config:
        """The shape of the backbone, without drop-path."""
        return preset(self.model, **self.model_overrides)


def check_blocks(stage: BaseModel, batch_size: int, block_size: int) -> None:
    """Raises KeyMistakeError unless blocks fill a batch."""
    if batch_size % block_size == 0:
        return
    is_default = "block_size" not in stage.model_fields_set
    lower, upper = batch_size // block_size * block_size, -(-batch_size // block_size) * block_size
    sizes = f"{lower} or {upper}" if lower else str(upper)
    fitting = max(size for size in range(1, min(batch_size, block_size) + 1) if batch_size % size == 0)
    what = f"batch_size {batch_size} is not a multiple of block_size {block_size}"
    raise KeyMistakeError(
        what + (", which is the default" if is_default else ""),
        key="batch_size" if "batch_size" in stage.model_fields_set else "block_size",
        hint=f"use batch_size {sizes}, or block_size {fitting}",
    )


def check_group(group: int | None, block_size: int) -> None:
    """Raises ValueError unless groups of KoLeo fill a block."""
    if group is not None and block_size % group:
        fitting = [size for size in range(2, block_size + 1) if block_size % size == 0]
        fits = min(fitting, key=lambda size: abs(size - group))
        raise ValueError(
            f"koleo_group {group} does not divide block_size {block_size}: groups lie within a block; use {fits}"
        )


def check_crops(
    crops: CropConfig, model: str, overrides: Mapping[str, Any] | None = None, at: str = "crops"
) -> None:
    """Raises KeyMistakeError unless the model's patch divides all crop sizes; `at` is where the section has them."""
    patch = preset(model, **(overrides or {})).patch_size
    for name in ("global_size", "local_size", "gram_size"):
        if (size := getattr(crops, name) or 0) % patch:
            nearest = max(1, round(size / patch)) * patch
            what = f"crops.{name} {size} is not a multiple of {model}'s patch size {patch}"
            raise KeyMistakeError(what, key=f"{at}.{name}", hint=f"use {nearest}")


def stage_seed(context: Context, kind: str) -> int:
    """A seed of its own for each kind of stage; not by name, which is not part of a stage's key."""
    from orchestrator.data.rng import derive

    return derive(context.seed, kind)


def last_snapshot(backbone: Path) -> Path:
    """The EMA with its heads that a backbone's artifact ends with."""
    return max((backbone / "snapshots").glob("step-*.safetensors"))


def summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """First and last loss and the speed, from a run's records."""
    if not history:
        return {}
    records = sorted(history, key=lambda record: int(record["step"]))
    seconds = sorted(record["metrics"]["step_seconds"] for record in records)
    return {
        "first_loss": records[0]["metrics"]["loss"],
        "last_loss": records[-1]["metrics"]["loss"],
        "step_seconds": seconds[len(seconds) // 2],
    }
