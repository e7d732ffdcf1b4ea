"""Splits of an index: pictures to train on, to choose settings on, to report on; and whether they overlap.

    splits = Splits.of(index, split, folder=artifact.path, sources=context.sources)
    splits.warn(logger)
    classes = splits.labels(index)               # where labels are needed
    splits.train, splits.validation, splits.test # int64 row numbers of the index, ascending

A stage that has a field `split: Split | None` adds `split.files()` to its `Stage.files`; so all that decides a split is
part of its key: the field itself, the content of lists and tables, and the index.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.schema import DataSource
from orchestrator.config.split import SPLITS, Split, SplitName
from orchestrator.data.bands import shown_rgb
from orchestrator.data.curation.descriptor import DIM, describe
from orchestrator.data.decode import UnreadableImage, use_rgb
from orchestrator.data.index import ImageIndex
from orchestrator.data.large_arrays import stacked
from orchestrator.data.named_splits import KnownFiles, SplitOf, files_of, split_of
from orchestrator.data.read_ahead import in_order
from orchestrator.data.rng import derive
from orchestrator.errors import UserError, nearest, shortened

Ids = NDArray[np.int64]

# Of the folder of an artifact that a curation made.
_DESCRIPTORS = "embeddings.npy"
# Pictures that are compared with all later ones at a time, and the number of similarities above which there are fewer
# of them.
_CHUNK, _MOST_SIMILARITIES = 1024, 2**24
# Descriptors that wait for each thread's turn.
_WAITING = 8
# Every picture is compared with every other one. Of more, that would take minutes.
_MOST_COMPARED = 150_000


@dataclass(frozen=True)
class Splits:
    """Row numbers of an index by split, int64 and ascending; no row is in two of them, none of them is empty.

    Attributes:
        train, validation, test: the rows.
        warnings: what the user should know, such as near duplicates in two splits.
        num_near: pairs of near duplicates in different splits.
        num_outside: rows of the index that are in no split.
    """

    train: Ids
    validation: Ids
    test: Ids
    warnings: tuple[UserError, ...] = ()
    num_near: int = 0
    num_outside: int = 0

    def __getitem__(self, name: SplitName) -> Ids:
        """The rows of a split by its name."""
        rows: Ids = getattr(self, name)
        return rows

    def __str__(self) -> str:
        return ", ".join(f"{len(self[name]):,} {name}" for name in SPLITS)

    @classmethod
    def of(
        cls,
        index: ImageIndex,
        split: Split,
        *,
        folder: Path | None = None,
        sources: Mapping[str, DataSource] | None = None,
        where: str = "split",
        stop: Callable[[], None] = lambda: None,
    ) -> Splits:
        """Split an index, and look whether the splits overlap by content.

        Pictures that are the same in every byte or pixel and in two splits are an error; near duplicates are counted
        in a warning. A split by hash has neither: equal bytes fall in one split, and near duplicates with them. There,
        a picture stays in its split when others are added, unless a near duplicate of it is added.

        Args:
            index: the pictures.
            split: how.
            folder: of the artifact that the index is from. Its record of copies tells which pictures of one split
                have copies in another, and its descriptors need not be computed again.
            sources: the datasets, for the captions files that `by: column` reads.
            where: key path of `split`, for messages.
            stop: called now and then; raises to stop.

        Raises:
            UserError: a split without pictures, a name that is not a picture, folder or value, a picture in two splits,
                or two equal pictures in different splits.
        """
        known = files_of(folder)
        placed = split_of(index, split, known, sources or {}, where)
        pairs = _Near(index, split.near_duplicate, folder, stop)
        if split.by == "hash":
            split_of_N = _by_hash(index, split, pairs.groups(np.arange(len(index))))
        else:
            split_of_N = np.full(len(index), -1, dtype=np.int64)
            for row, one in enumerate(index):
                found = placed(one.source, one.path, one.component)
                if found is not None:
                    split_of_N[row] = SPLITS.index(found)
            if not split.validation:
                _carve(index, split, split_of_N, pairs)
        rows = [np.flatnonzero(split_of_N == at).astype(np.int64) for at in range(len(SPLITS))]
        for name, chosen in zip(SPLITS, rows, strict=True):
            if not len(chosen):
                raise _empty(index, split, name, where)
        warnings = []
        _refuse_copies(index, split_of_N, known, placed if split.by != "hash" else None, where)
        # What is kept together has been looked at; what was not is told by `pairs`.
        num_near, example = (0, None) if split.by == "hash" else pairs.across(split_of_N)
        if example is not None:
            warnings.append(_near(index, example, num_near, split_of_N, where))
        if pairs.skipped:
            warnings.append(
                UserError(
                    f"near duplicates were not looked for among {len(index):,} pictures, more than "
                    f"{_MOST_COMPARED:,}",
                    where=where,
                    hint="remove them with `near_duplicate` of the curation",
                )
            )
        outside = int((split_of_N < 0).sum())
        train, validation, test = rows
        return cls(train, validation, test, tuple(warnings), num_near, outside)

    def warn(self, logger: logging.Logger) -> None:
        """Log every warning, a line each."""
        for warning in self.warnings:
            logger.warning("%s: %s; %s", warning.where, warning.what, warning.hint)

    def labels(self, index: ImageIndex, where: str = "split") -> tuple[str, ...]:
        """The labels of the training pictures, sorted; pictures without a label do not count.

        Raises:
            UserError: fewer than two labels, or labels of the other splits that training has not.
        """
        of = {
            name: Counter(index[int(row)].label for row in self[name] if index[int(row)].label)
            for name in SPLITS
        }
        names = sorted(str(label) for label in of["train"])
        if len(names) < 2:
            only = f"only one label, {names[0]!r}" if names else "no labels"
            raise UserError(
                f"the {len(self.train):,} pictures of train have {only}",
                where=where,
                hint="classes need at least two labels: give the dataset a captions file with a `label` column",
            )
        for name in ("validation", "test"):
            unseen = sorted(str(label) for label in of[name] if label not in of["train"])
            if unseen:
                close = nearest(unseen[0], names)
                raise UserError(
                    f"{name} has {len(unseen)} label{'s' if len(unseen) > 1 else ''} that train lacks: "
                    f"{shortened(', '.join(map(repr, unseen)), 200)}",
                    where=where,
                    hint=f"did you mean {close!r}? " * bool(close)
                    + "put some pictures of each label into train",
                )
        return tuple(names)


def split_by_hash(sha256: str, split: Split) -> SplitName:
    """The split of a picture by its bytes alone, whatever other pictures there are.

    With a larger `test_share` the test split keeps its pictures and gains others.
    """
    place = derive("split", split.seed, sha256) / 2**64
    if place < split.test_share:
        return "test"
    return "validation" if place < split.test_share + split.validation_share else "train"


def _by_hash(index: ImageIndex, split: Split, group_of_N: Ids) -> Ids:
    """The split of each row; rows of a group go where its smallest hash goes."""
    first: dict[int, str] = {}
    for row, group in enumerate(group_of_N.tolist()):
        first[group] = min(first.get(group, "~"), index[row].sha256)
    return np.array(
        [SPLITS.index(split_by_hash(first[group], split)) for group in group_of_N.tolist()], dtype=np.int64
    )


def _carve(index: ImageIndex, split: Split, split_of_N: Ids, pairs: _Near) -> None:
    """Take the validation pictures out of those of train, in place."""
    rows = np.flatnonzero(split_of_N == 0)
    groups: dict[int, list[int]] = defaultdict(list)
    for row, group in zip(rows.tolist(), pairs.groups(rows).tolist(), strict=True):
        groups[group].append(row)
    for members in groups.values():
        smallest = min(index[row].sha256 for row in members)
        if derive("validation", split.seed, smallest) / 2**64 < split.validation_share:
            split_of_N[members] = 1


class _Near:
    """Near duplicates among the rows of an index, by the cosine of their descriptors."""

    def __init__(
        self, index: ImageIndex, threshold: float, folder: Path | None, stop: Callable[[], None]
    ) -> None:
        self._index, self._threshold, self._folder, self._stop = index, threshold, folder, stop
        self._found: list[tuple[int, int]] | None = None
        self.skipped = False

    def groups(self, rows: Ids) -> Ids:
        """A number of the group of each of these rows: near duplicates, and theirs, are in one group."""
        inside = np.zeros(len(self._index), dtype=bool)
        inside[rows] = True
        first = list(range(len(self._index)))

        def find(row: int) -> int:
            while first[row] != row:
                first[row] = first[first[row]]
                row = first[row]
            return row

        for one, other in self._pairs():
            if inside[one] and inside[other]:
                a, b = find(one), find(other)
                first[max(a, b)] = min(a, b)
        return np.array([find(row) for row in rows.tolist()], dtype=np.int64)

    def across(self, split_of_N: Ids) -> tuple[int, tuple[int, int] | None]:
        """How many pairs are in two splits, and one of them."""
        found = [
            pair
            for pair in self._pairs()
            if split_of_N[pair[0]] != split_of_N[pair[1]] and min(split_of_N[list(pair)]) >= 0
        ]
        return len(found), found[0] if found else None

    def _pairs(self) -> list[tuple[int, int]]:
        if self._found is None:
            self.skipped = len(self._index) > _MOST_COMPARED
            self._found = [] if self.skipped else self._search(self._descriptors())
        return self._found

    def _search(self, unit_ND: NDArray[np.float32]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        step = min(_CHUNK, _MOST_SIMILARITIES // max(1, len(unit_ND)))
        for start in range(0, len(unit_ND), step):
            self._stop()
            rows, others = np.nonzero(unit_ND[start : start + step] @ unit_ND[start:].T >= self._threshold)
            found += [
                (start + a, start + b) for a, b in zip(rows.tolist(), others.tolist(), strict=True) if a < b
            ]
        return found

    def _descriptors(self) -> NDArray[np.float32]:
        """(N, 336) of unit length: those that the curation computed, or else of every picture."""
        path = self._folder / _DESCRIPTORS if self._folder is not None else None
        if path is not None and path.is_file():
            kept: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
            if kept.shape == (len(self._index), DIM):
                return kept
        count, loaders = len(self._index), os.cpu_count() or 1
        made = in_order(self._describe, range(count), loaders, ahead=_WAITING * loaders)
        found: NDArray[np.float32] = stacked((one_D[None] for one_D in made), count)
        return found

    def _describe(self, row: int) -> NDArray[np.float32]:
        self._stop()
        try:
            return use_rgb(
                self._index.path(row),
                lambda pixels: describe(shown_rgb(pixels, self._index.pixels(row))),
                max_pixels=self._index[row].max_pixels,
                pixels=self._index.pixels(row),
            )
        except UnreadableImage as error:
            raise UserError(
                f"a picture of the index cannot be read any more: {error.reason}",
                where=str(error.path),
                hint="restore the file, or run again: `curate` then makes a new index of the files that exist",
            ) from error


def _refuse_copies(
    index: ImageIndex, split_of_N: Ids, known: KnownFiles, placed: SplitOf | None, where: str
) -> None:
    """Raises UserError for two files with the same picture that are in different splits."""
    first: dict[str, int] = {}
    for row in np.flatnonzero(split_of_N >= 0).tolist():
        other = first.setdefault(index[row].sha256, row)
        if split_of_N[other] != split_of_N[row]:
            raise _overlap(
                (_name(index, other), SPLITS[split_of_N[other]]),
                (_name(index, row), SPLITS[split_of_N[row]]),
                where,
            )
    if placed is None:
        return
    row_of = {f"{one.source}/{one.path}": row for row, one in enumerate(index)}
    for copy in known.copies:
        row = row_of.get(copy.of, -1)
        found = placed(copy.source, copy.path, "") if copy.same and row >= 0 else None
        kept = None if row < 0 else placed(index[row].source, index[row].path, index[row].component)
        if found is not None and kept is not None and found != kept:
            raise _overlap((copy.of, kept), (f"{copy.source}/{copy.path}", found), where)


def _overlap(one: tuple[str, str], other: tuple[str, str], where: str) -> UserError:
    return UserError(
        f"{one[0]} is in {one[1]}, and {other[0]} in {other[1]}, with the same picture",
        where=where,
        hint="remove one of the two files, or put both into one split",
    )


def _near(index: ImageIndex, pair: tuple[int, int], count: int, split_of_N: Ids, where: str) -> UserError:
    one, other = (f"{_name(index, row)} ({SPLITS[split_of_N[row]]})" for row in pair)
    pairs = "1 pair of pictures is" if count == 1 else f"{count:,} pairs of pictures are"
    return UserError(
        f"{pairs} nearly the same and in different splits, such as {one} and {other}",
        where=where,
        hint="figures may be too good; a split by hash keeps them together",
    )


def _empty(index: ImageIndex, split: Split, name: SplitName, where: str) -> UserError:
    if split.by == "hash":
        hint = f"the index has too few for this share ({len(index):,}): give {name} a larger one"
    elif name == "validation" and not split.validation:
        hint = "raise `validation_share`, or name the pictures of `validation`"
    else:
        hint = f"the curation may have left them out: see its report; or correct `{name}`"
    return UserError(f"the split {name!r} has no pictures", where=where, hint=hint)


def _name(index: ImageIndex, row: int) -> str:
    return f"{index[row].source}/{index[row].path}"
