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

    on: Literal["dense_health"]
    window: int = Field(100, ge=1, description="steps whose figures are averaged")
    cosine_rise: float | None = Field(
        0.05, gt=0, description="of the CLS–patch cosine over the best window's; null leaves it out"
    )
    locality_drop: float | None = Field(
        0.05, gt=0, description="of the patch locality below the best window's; null leaves it out"
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

    weight: Schedule = Schedule(peak=2.0)
    teacher: int | Literal["earliest", "latest", "best"] = Field(
        "earliest",
        description="snapshot to anchor to, of any stage that led here: by the updates since the weights were made, "
        "the first or last of all, or the one with the best dense health",
    )
    trigger: Annotated[DenseHealth | None, BeforeValidator(_by_name)] = Field(
        None, description="what starts it; null: it is on from the stage's first step"
    )
    first_update: int | None = Field(None, ge=1, description="step at which the teacher first takes the EMA")
    update_every: int = Field(10_000, ge=1, description="steps between later updates")
    max_updates: int = Field(3, ge=0)
    form: Literal["auto", "patches", "features"] = "auto"
    antialias: bool = Field(
        True,
        description="Whether the feature map of a Gram teacher with larger crops is smoothed before it is made as "
        "small as the student's. The published code does not smooth.",
    )
    clip_negatives: bool = Field(
        False, description="take negative similarities of both for 0; needs the P×P matrices"
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

    weight: Schedule = Schedule(peak=1.5)
    teacher: int | Literal["earliest", "latest", "best"] = "latest"
    trigger: None = None
