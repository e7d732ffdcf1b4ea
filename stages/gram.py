"""What the config of Gram anchoring says: to whom, how strongly, and from when on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.spec import Schedule, Settings


class DenseHealth(Settings):
    """Start anchoring once dense features have decayed, as the paper's authors did by eye (section 4.1).

    Steps are cut into windows. A window's dense health is the mean of `cls_patch_cosine` (low is good) and of
    `patch_locality` (high is good) over its steps; the better of two windows is the one whose locality exceeds its
    cosine by more. The EMA after the best window so far is kept as the Gram teacher, and at the end of the first
    window that is worse than the best by every amount that is set, anchoring starts.
    """

    on: Literal["dense_health"] = Field(description="What is watched; there is one choice.")
    window: int = Field(100, ge=1, description="The number of steps whose figures are averaged.")
    cosine_rise: float | None = Field(
        0.05,
        gt=0,
        description="How far the CLS–patch cosine has to rise over the best window's before anchoring starts; null "
        "leaves it out.",
    )
    locality_drop: float | None = Field(
        0.05,
        gt=0,
        description="How far the patch locality has to fall below the best window's before anchoring starts; null "
        "leaves it out.",
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

    With a trigger everything about anchoring, the DINO-local weight included, counts its steps from the step at
    which it starts.
    """

    weight: Schedule = Field(Schedule(peak=2.0), description="The weight of the Gram loss by step.")
    teacher: int | Literal["earliest", "latest", "best"] = Field(
        "earliest",
        description="The snapshot to anchor to, of any stage that led here: by its number of updates, the first or "
        "last of all, or the one with the best dense health.",
    )
    trigger: Annotated[DenseHealth | None, BeforeValidator(_by_name)] = Field(
        None, description="What starts anchoring. Default: it is on from the stage's first step."
    )
    first_update: int | None = Field(
        None,
        ge=1,
        description="The step at which the Gram teacher first takes the EMA. Default: it never does.",
    )
    update_every: int = Field(
        10_000, ge=1, description="The number of steps from one update of the Gram teacher to the next."
    )
    max_updates: int = Field(3, ge=0, description="The largest number of updates of the Gram teacher.")
    form: Literal["auto", "patches", "features"] = Field(
        "auto",
        description="How the loss is computed, with the same result: from P×P matrices of patches, from D×D "
        "matrices of features, or whichever is faster.",
    )
    antialias: bool = Field(
        True,
        description="Whether the feature map of a Gram teacher with larger crops is smoothed before it is made as "
        "small as the student's. The published code does not smooth.",
    )
    clip_negatives: bool = Field(
        False,
        description="Whether negative similarities of student and teacher count as 0; needs the P×P matrices.",
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


class RefinementGram(Gram):
    """Gram anchoring of the high-resolution refinement (section 5.1): to what the stage starts from, from step 0."""

    weight: Schedule = Field(Schedule(peak=1.5), description="The weight of the Gram loss by step.")
    teacher: int | Literal["earliest", "latest", "best"] = Field(
        "latest",
        description="The snapshot to anchor to, of any stage that led here; latest is what the stage starts from.",
    )
    trigger: None = Field(None, description="Refinement is anchored from its first step.")
