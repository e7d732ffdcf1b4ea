"""Which rows of a curated index a stage draws: names and weights of its config → a sample order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.components import HELD_OUT, LEFT_OUT
from orchestrator.data.index import ImageIndex
from orchestrator.data.sampler import SampleOrder
from orchestrator.errors import UserError, nearest

# Enough for any share to show; a run of more steps goes on in the same way.
_MAX_STEPS = 2000


def sample_order(
    index: ImageIndex,
    mix: Sequence[str] | Mapping[str, float] | None,
    homogeneous: tuple[str, float] | None = None,
    *,
    batch_size: int,
    seed: int,
    keep_N: NDArray[np.bool_] | None = None,
) -> SampleOrder:
    """The order in which a stage draws rows: never those that were held out, each as often as its weight says.

    Args:
        index: the photographs.
        mix: names of components and datasets that mixed batches are drawn from, or their weights. None: what
            the curation chose.
        homogeneous: the dataset of homogeneous batches, and the share of the batches that are; None: there are
            none.
        batch_size: samples a step.
        seed: of the order.
        keep_N: which rows take part at all; default: all.

    Raises:
        UserError: a name without rows, or the curation chose nothing. `where` is the field, "mix" or
            "homogeneous".
    """
    if len(held_out := index.rows_of(HELD_OUT)):
        keep_N = np.ones(len(index), dtype=np.bool_) if keep_N is None else keep_N.copy()
        keep_N[held_out] = False
    if mix is None and not index.chosen:
        raise _none_chosen(index)
    if mix is None:
        parts = {name: _kept(index.rows_of(name), keep_N) for name in index.chosen}
    else:
        parts = {name: _kept(_rows(index, name), keep_N) for name in mix}
        empty = next((name for name, rows in parts.items() if not len(rows)), None)
        if empty is not None:
            raise _empty(empty, "mix", [*index.components, *index.sources])
    own = None
    if homogeneous is not None:
        source, share = homogeneous
        own = _kept(index.rows_from(source), keep_N), share
        if not len(own[0]):
            raise _empty(source, "homogeneous", index.sources)
    return SampleOrder(
        parts,
        dict(mix) if isinstance(mix, Mapping) else None,
        own,
        batch_size=batch_size,
        seed=seed,
        row_weights=index.weights,
    )


def held_out_order(index: ImageIndex, *, batch_size: int, seed: int) -> SampleOrder:
    """The order in which held-out rows are looked at.

    Raises:
        UserError: there are none. `where` is the field, "validate_every".
    """
    rows = index.rows_of(HELD_OUT)
    if not len(rows):
        raise UserError(
            "the index has no held-out photos to evaluate on",
            where="validate_every",
            hint="set `holdout` of the `curate` stage, for example to 0.02, or leave out `validate_every`",
        )
    return SampleOrder({HELD_OUT: rows}, batch_size=batch_size, seed=seed)


def count_draws(index: ImageIndex, order: SampleOrder, num_steps: int) -> NDArray[np.int64]:
    """How often steps draw each row of the index: all steps of a run, or the first 2,000 of a longer one."""
    drawn_N = np.zeros(len(index), dtype=np.int64)
    for step in range(min(num_steps, _MAX_STEPS)):
        np.add.at(drawn_N, order.ids(step), 1)
    return drawn_N


def by_cluster(clusters_N: NDArray[np.int64], counts_N: NDArray[np.int64]) -> dict[int, int]:
    """Sums of the rows' counts by cluster; a cluster whose rows count nothing is there with 0."""
    numbers, places_N = np.unique(clusters_N, return_inverse=True)
    sums = np.zeros(len(numbers), dtype=np.int64)
    np.add.at(sums, places_N, counts_N)
    return dict(zip(numbers.tolist(), sums.tolist(), strict=True))


def effective_number(counts: Sequence[float]) -> float:
    """How many equally frequent clusters have the entropy of these: exp(entropy), from 1 to len(counts)."""
    shares = np.asarray([count for count in counts if count > 0], dtype=np.float64)
    shares /= shares.sum()
    return math.exp(-float(np.sum(shares * np.log(shares))))


def _rows(index: ImageIndex, name: str) -> NDArray[np.int64]:
    """The rows of a component or a dataset."""
    of_component, of_source = index.rows_of(name), index.rows_from(name)
    if len(of_component) and len(of_source):
        raise UserError(
            f"{name!r} is a component of the index and a dataset",
            where="mix",
            hint="give the dataset another name",
        )
    return of_component if len(of_component) else of_source


def _kept(rows: NDArray[np.int64], keep_N: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    return rows if keep_N is None else rows[keep_N[rows]]


def _none_chosen(index: ImageIndex) -> UserError:
    """That nothing is left which training draws from unless it is told otherwise."""
    held_out, left_out = HELD_OUT in index.components, LEFT_OUT in index.components
    those = [f"are held out, component {HELD_OUT!r}"] if held_out else []
    those += [f"the curation left out, component {LEFT_OUT!r}"] if left_out else []
    hints = [f"write `mix: {LEFT_OUT}` to train on these"] if left_out else []
    hints += ["set a smaller `holdout` of the stage that made it"] if held_out else []
    return UserError(
        f"the index has no photos but those that {', or that '.join(those)}",
        where="mix",
        hint=", or ".join(hints),
    )


def _empty(name: str, field: str, known: Sequence[str]) -> UserError:
    there = sorted(set(known))
    if name in there:
        return UserError(f"no photo of {name!r} can be used by this stage", where=field)
    close = nearest(name, there)
    return UserError(
        f"the index has no photos of {name!r}",
        where=field,
        hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(there)}",
    )
