"""What a training stage is trained on: fields that name components and datasets, and their checks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from orchestrator.config.schema import MIN_SHARE, Mix
from orchestrator.errors import UserError, nearest
from orchestrator.stages.base import TrainStage

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.data.sampler import SampleOrder

DRAWN = "drawn.json"
DRAWN_MEANS = "how often training drew a photo of each cluster, and how many clusters that is in effect"


class MixStage(TrainStage):
    """A training stage that draws from named parts of an index."""

    mix: Mix | None = Field(
        None,
        description="The datasets and components of the index that mixed batches are sampled from (DINOv3, section "
        "3.1): a name, a list of names, or a sampling weight for each name. Weights are relative; each is at least a "
        "millionth of their sum. Without weights, each photo is used once per epoch. Default: what `curate` selected.",
    )

    def check_index(self, components: Sequence[str], sources: Sequence[str]) -> None:
        """See :class:`Stage`."""
        known = sorted({*components, *sources})
        for name in self.mix or ():
            if name in components and name in sources:
                raise UserError(
                    f"{name!r} is a component of the index and a dataset",
                    where="mix",
                    hint="give the dataset another name",
                )
            if name not in known:
                close = nearest(name, known)
                raise UserError(
                    f"mix names {name!r}, which is neither a component of the index nor a dataset of it",
                    where="mix",
                    hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(known)}",
                )


class HomogeneousMixStage(MixStage):
    """A training stage some of whose batches come from one dataset each."""

    homogeneous: str | None = Field(
        None,
        description="The dataset that homogeneous batches are sampled from, with all its photos in the index "
        "(DINOv3, section 3.1). Default: all batches are mixed.",
    )
    homogeneous_ratio: float = Field(
        0.1,
        ge=0,
        le=1,
        description="The share of all batches that are homogeneous, from 0 to 1 (DINOv3, section 3.1: 0.1). It "
        "requires `homogeneous`.",
    )

    @field_validator("homogeneous_ratio")
    @classmethod
    def _some(cls, ratio: float) -> float:
        if 0 < ratio < MIN_SHARE:
            raise ValueError(
                f"{ratio:g} is less than one batch in a million: give 0, or {MIN_SHARE:g} and more"
            )
        return ratio

    def check(self) -> None:
        """See :class:`Stage`."""
        # `homogeneous: null` says that there are none, as the file with all defaults written out does.
        if "homogeneous_ratio" in self.model_fields_set and "homogeneous" not in self.model_fields_set:
            raise UserError(
                "homogeneous_ratio is set, but `homogeneous` does not name the dataset of homogeneous batches",
                where="homogeneous_ratio",
                hint="name the dataset, `homogeneous: …`, or leave `homogeneous_ratio` out",
            )

    def sample_order(self, index: ImageIndex, batch_size: int, seed: int) -> SampleOrder:
        """The order in which this stage draws rows; see :func:`orchestrator.data.curation.mix.sample_order`."""
        from orchestrator.data.curation.mix import sample_order

        homogeneous = None if self.homogeneous is None else (self.homogeneous, self.homogeneous_ratio)
        return sample_order(index, self.mix, homogeneous, batch_size=batch_size, seed=seed)

    def check_index(self, components: Sequence[str], sources: Sequence[str]) -> None:
        """See :class:`Stage`."""
        super().check_index(components, sources)
        name = self.homogeneous
        if name is None or name in sources:
            return
        if name in components:
            others = " or ".join(f"`homogeneous: {source}`" for source in sources)
            raise UserError(
                f"homogeneous names {name!r}, a component of the index: homogeneous batches come from a dataset",
                where="homogeneous",
                hint=f"write `mix: {name}` to train on this component, and {others} for homogeneous batches, or "
                "leave `homogeneous` out",
            )
        close = nearest(name, sources)
        raise UserError(
            f"homogeneous names {name!r}, which is not a dataset of the index",
            where="homogeneous",
            hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(sources)}",
        )


@dataclass(frozen=True)
class Draws:
    """The photographs of a stage, and the order in which it draws them."""

    index: ImageIndex
    order: SampleOrder

    def most_unreadable(self, share: float) -> int:
        """How many photographs that is; see :func:`orchestrator.data.image_reader.most_unreadable`."""
        from orchestrator.data.image_reader import most_unreadable

        return most_unreadable(share, len(self.index))

    def write(self, num_steps: int, folder: Path) -> dict[str, float]:
        """What a run of so many steps drew, as `drawn.json`; returns the figure for the summary.

        `draws` are counted by cluster; `left_out` is the share of them that the curation had left out.
        """
        from orchestrator.data.curation.components import LEFT_OUT
        from orchestrator.data.curation.mix import by_cluster, count_draws, effective_number

        drawn_N = count_draws(self.index, self.order, num_steps)
        clusters = by_cluster(self.index.clusters, drawn_N)
        effective = effective_number(list(clusters.values()))
        record = {
            "draws": int(drawn_N.sum()),
            "left_out": float(drawn_N[self.index.rows_of(LEFT_OUT)].sum() / drawn_N.sum()),
            "effective_clusters": effective,
            "clusters": {str(name): count for name, count in clusters.items()},
        }
        (folder / DRAWN).write_text(json.dumps(record, indent=1))
        return {"drawn_clusters": effective}


def draws_of(stage: str, make: Callable[[ImageIndex], SampleOrder], folder: Path) -> Draws:
    """The draws of a stage, before its first step.

    Args:
        stage: its name.
        make: the order of its draws from an index.
        folder: of the index.

    Raises:
        UserError: a name without photographs.
    """
    from orchestrator.data.index import ImageIndex

    index = ImageIndex.load(folder)
    try:
        return Draws(index, make(index))
    except UserError as error:
        field = f".{error.where}" if error.where else ""
        raise UserError(error.what, where=f"stages.{stage}{field}", hint=error.hint) from None
