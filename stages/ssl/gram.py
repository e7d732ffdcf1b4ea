"""What the config of Gram anchoring says: to whom, how strongly, and from when on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.config.schedules import Schedule
from orchestrator.config.settings import Settings


class DenseHealth(Settings):
    """Starts anchoring once dense features have degraded, which the paper's authors judged by eye (section 4.1).

    Training steps are divided into windows. The dense health of a window is the mean over its steps of
    `cls_patch_cosine` (lower is better) and of `patch_locality` (higher is better). Of two windows, the better one
    has the larger difference of locality minus cosine. The EMA weights after the best window so far are kept as the
    Gram teacher. Anchoring starts at the end of the first window that is worse than the best one by every amount
    that is set here.
    """

    on: Literal["dense_health"] = Field(
        description="The metric that starts anchoring. The only choice is dense_health."
    )
    window: int = Field(100, ge=1, description="The number of steps that the metrics are averaged over.")
    cosine_rise: float | None = Field(
        0.05,
        gt=0,
        description="The rise of the CLS–patch cosine above the best window's value at which anchoring starts. null "
        "ignores the cosine.",
    )
    locality_drop: float | None = Field(
        0.05,
        gt=0,
        description="The drop of the patch locality below the best window's value at which anchoring starts. null "
        "ignores the locality.",
    )

    @model_validator(mode="after")
    def _has_an_amount(self) -> DenseHealth:
        if self.cosine_rise is None and self.locality_drop is None:
            raise ValueError("set cosine_rise, locality_drop, or both: without either nothing would start")
        return self


def _by_name(value: Any) -> Any:
    return {"on": value} if isinstance(value, str) else value


class Gram(Settings):
    """Gram anchoring (arXiv 2508.10104, section 4).

    With a trigger, all schedules of anchoring, and `local_weight` too, count their steps from the step at which
    anchoring starts.
    """

    weight: Schedule = Field(
        Schedule(peak=2.0), description="The weight of the Gram loss by step (DINOv3, section 4.2: 2)."
    )
    teacher: int | Literal["earliest", "latest", "best", "start"] = Field(
        "earliest",
        description="The snapshot that is the Gram teacher, from any earlier stage: its step number, the earliest or "
        "latest snapshot, or the one with the best dense health. start is the backbone that the stage starts from, and "
        "the only choice with `from`.",
    )
    trigger: Annotated[DenseHealth | None, BeforeValidator(_by_name)] = Field(
        None, description="The condition that starts anchoring. Default: anchoring is on from the first step."
    )
    first_update: int | None = Field(
        None,
        ge=1,
        description="The step at which the Gram teacher is first updated with the EMA weights. Default: it is never "
        "updated.",
    )
    update_every: int = Field(
        10_000,
        ge=1,
        description="The interval between updates of the Gram teacher, in steps (DINOv3, section 4.2: 10,000).",
    )
    max_updates: int = Field(
        3,
        ge=0,
        description="The maximum number of updates of the Gram teacher (DINOv3's published code: 3).",
    )
    form: Literal["auto", "patches", "features"] = Field(
        "auto",
        description="The way in which the loss is computed: from P×P matrices of patches, from D×D matrices of "
        "features, or auto for the faster of both. The result is the same.",
    )
    antialias: bool = Field(
        True,
        description="Whether the feature map of a Gram teacher with larger crops is smoothed before it is downsampled "
        "to the student's size. DINOv3's published code does not smooth it.",
    )
    clip_negatives: bool = Field(
        False,
        description="Whether negative similarities of student and teacher are clipped to 0. It is not possible with "
        "`form: features`.",
    )

    @model_validator(mode="after")
    def _clips_in_patches_form(self) -> Gram:
        if self.clip_negatives and self.form == "features":
            raise ValueError("clip_negatives needs the P×P matrices: form 'patches' or 'auto'")
        return self

    def updates_at(self, step: int) -> bool:
        """Whether the Gram teacher takes the EMA after `step` updates."""
        if self.first_update is None or step < self.first_update:
            return False
        since = step - self.first_update
        return since % self.update_every == 0 and since // self.update_every < self.max_updates


class StartGram(Gram):
    """Gram anchoring of pretraining that goes on from a trained backbone. It is on from step 0."""

    teacher: Literal["start"] = Field(
        "start", description="The Gram teacher, which is the backbone that the stage starts from."
    )
    trigger: None = Field(None, description="Anchoring to the start is on from the first step.")


class RefinementGram(Gram):
    """Gram anchoring in high-resolution refinement (section 5.1). It is on from step 0."""

    weight: Schedule = Field(
        Schedule(peak=1.5), description="The weight of the Gram loss by step (DINOv3, section 5.1: 1.5)."
    )
    teacher: int | Literal["earliest", "latest", "best", "start"] = Field(
        "latest",
        description="The snapshot that is the Gram teacher, from any earlier stage. latest and start are the "
        "checkpoint that the stage starts from.",
    )
    trigger: None = Field(None, description="Refinement is anchored from its first step.")
