"""Whether what a pipeline file says of pixels is enough, and is the same for all that is trained on together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from orchestrator.config.schema import DataSource
from orchestrator.errors import UserError

# Values of 16 bits that use their range reach beyond half of it.
_HALF = 2**15


def likely_white(peaks: Sequence[int]) -> int | None:
    """The value that is probably white, if files of 16 bits use a small part of them; None if not, or without any.

    Args:
        peaks: the largest value of each file of 16 bits, 0 of others.
    """
    most = max(peaks, default=0)
    return None if not most or most >= _HALF else int(2 ** max(most.bit_length(), 8) - 1)


def unclear_range(name: str, peaks: Sequence[int]) -> UserError | None:
    """The question, if the files of a dataset have 16 bits and use a small part of them; None if not.

    Their high bytes would be few levels: of 12 bits, sixteen.

    Args:
        name: the dataset's.
        peaks: `ScannedImage.peak` of its files.
    """
    deep = [peak for peak in peaks if peak]
    white = likely_white(deep)
    if white is None:
        return None
    files = (
        f"1 file of dataset {name!r} has"
        if len(deep) == 1
        else f"{len(deep):,} files of dataset {name!r} have"
    )
    return UserError(
        f"{files} 16 bits a value, and no value above {max(deep):,}: which one is white?",
        where=f"data.{name}.pixels",
        hint=f"set `pixels: {{range: [0, {white}]}}`; [0, 65535] keeps them as dark as they are",
    )


def unlike_pixels(sources: Mapping[str, DataSource], names: Sequence[str]) -> UserError | None:
    """Why datasets cannot be trained on together; None if they can.

    Args:
        sources: the pipeline's datasets.
        names: of those whose pictures one index holds.
    """
    known = [name for name in names if name in sources]
    for first, other in itertools.pairwise(known):
        for what, of in _KINDS.items():
            if of(sources[first]) != of(sources[other]):
                return UserError(
                    f"datasets {first!r} and {other!r} are read by one stage, and differ in {what} of `pixels`",
                    where=f"data.{other}.pixels",
                    hint="give both the same, or curate them in pipelines of their own",
                )
    return None


_KINDS: Mapping[str, Callable[[DataSource], object]] = {
    "the number of bands": lambda source: source.pixels.num_channels if source.pixels else 3,
    "the mean": lambda source: source.pixels and source.pixels.mean,
    "the deviation": lambda source: source.pixels and source.pixels.std,
    "the number of bits that the range needs": lambda source: bool(source.pixels and source.pixels.is_deep),
    "whether their bands are colours": lambda source: source.pixels is None or source.pixels.is_colour,
}
