"""How the values of a dataset's files become what a model sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from orchestrator.config.settings import Settings, in_key_if_set

MAX_BANDS = 512

_Band = Annotated[int, Field(ge=0, le=4095)]
_Level = Annotated[float, Field(ge=-10, le=10)]
_Spread = Annotated[float, Field(gt=0, le=10)]


class PixelFormat(Settings):
    """The bands of a dataset's files, their range of values, and the mean and deviation that models normalize with.

    All files of a dataset are read in the same way: no file is rescaled by its own minimum and maximum.
    """

    bands: tuple[_Band, ...] | None = Field(
        None,
        min_length=1,
        max_length=MAX_BANDS,
        description="The bands of each file that the model sees as its channels, counted from 0; a single one is seen "
        "three times. No band is then taken for transparency. Default: grey is seen three times, red, green and blue "
        "are seen as they are, and transparent pixels are laid on white.",
    )
    range: tuple[float, float] | None = Field(
        None,
        description="The values that the model sees as black and as white, such as [0, 4095] for 12 bits in 16-bit "
        "files. Values outside are clipped. Default: 0 to 255, and 0 to 65535 in 16-bit files.",
    )
    mean: tuple[_Level, ...] | None = Field(
        None,
        description="The mean of each channel that models subtract, on a scale where black is 0 and white is 1. "
        "Default: ImageNet's for three channels, and for any other number what `curate` measures.",
    )
    std: tuple[_Spread, ...] | None = Field(
        None,
        description="The standard deviation of each channel that models divide by, on a scale where black is 0 and "
        "white is 1. Default: ImageNet's for three channels, and for any other number what `curate` measures.",
    )
    shown: tuple[_Band, _Band, _Band] | None = in_key_if_set(
        None,
        description="The bands that are shown as red, green and blue in reports, counted from 0 in the file; they are "
        "among `bands`. Default: the first three.",
    )

    @model_validator(mode="after")
    def _possible(self) -> PixelFormat:
        for name in ("mean", "std"):
            found = getattr(self, name)
            if found is not None and len(found) != self.num_channels:
                raise ValueError(
                    f"{name} has {len(found)} numbers, and models see {self.num_channels} channels: give one for each"
                )
        seen = self.bands or (0, 1, 2)
        if self.shown is not None and not set(self.shown) <= set(seen):
            raise ValueError(
                f"shown is {list(self.shown)}: show three of the bands that are seen, {list(seen)}"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(
                f"range is {list(self.range)}: give black first and white second, such as [0, 4095]"
            )
        return self

    @property
    def num_channels(self) -> int:
        """The number of channels that models see."""
        return 3 if self.bands is None or len(self.bands) == 1 else len(self.bands)

    def channels_of(self, bands: Sequence[int]) -> tuple[int, ...]:
        """Where the bands of a file are among the channels that models see.

        Raises:
            ValueError: one of them is not seen.
        """
        seen = self.bands or (0, 1, 2)
        lacking = [band for band in bands if band not in seen]
        if lacking:
            raise ValueError(f"band {lacking[0]} is not among the bands that are seen, {list(seen)}")
        # One band is three channels that are the same.
        return tuple(seen.index(band) for band in bands)

    @property
    def is_measured(self) -> bool:
        """Whether mean and deviation are still to be measured: of other than three channels nothing is usual."""
        return self.num_channels != 3 and (self.mean is None or self.std is None)

    @property
    def shown_channels(self) -> tuple[int, int, int]:
        """The channels that are shown as red, green and blue; of two channels the first is grey."""
        if self.shown is not None and self.bands is not None and len(self.bands) > 1:
            red, green, blue = (self.bands.index(band) for band in self.shown)
            return red, green, blue
        if self.shown is not None and self.bands is None:
            return self.shown
        return (0, 1, 2) if self.num_channels > 2 else (0, 0, 0)

    def record(self) -> dict[str, Any]:
        """Plain JSON, as keys and files have it: without `shown` where that is not set, as before there was any."""
        return self.model_dump(mode="json", exclude={"shown"} if self.shown is None else None)

    @property
    def is_deep(self) -> bool:
        """Whether pixels are kept as 16 bits: the range has more levels than 8 bits have, or others."""
        if self.range is None:
            return False
        low, high = self.range
        return not (low.is_integer() and high.is_integer() and low >= 0 and high <= 255)

    @property
    def is_colour(self) -> bool:
        """Whether the channels are red, green and blue, so that hue, saturation and grey mean something."""
        return self.bands in (None, (0, 1, 2))
