"""How the values of a dataset's files become what a model sees."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from orchestrator.config.settings import Settings

_Band = Annotated[int, Field(ge=0, le=4095)]
_Level = Annotated[float, Field(ge=-10, le=10)]
_Spread = Annotated[float, Field(gt=0, le=10)]


class PixelFormat(Settings):
    """The bands of a dataset's files, their range of values, and the mean and deviation that models normalize with.

    The same for all files of a dataset: no file is stretched by what happens to be in it.
    """

    bands: tuple[_Band, ...] | None = Field(
        None,
        description="The bands of each file that the model sees, counted from 0: three, or one that it sees three "
        "times. Four bands are then not red, green, blue and transparency. Default: grey is seen three times, red, "
        "green and blue as they are, and transparency is laid on white.",
    )
    range: tuple[float, float] | None = Field(
        None,
        description="The values that the model sees as black and as white, such as [0, 4095] for 12 bits in 16-bit "
        "files. Values outside are cut off. Default: 0 to 255, and 0 to 65535 in 16-bit files.",
    )
    mean: tuple[_Level, _Level, _Level] | None = Field(
        None,
        description="The mean of each channel that models subtract, on a scale where black is 0 and white is 1. "
        "Default: ImageNet's.",
    )
    std: tuple[_Spread, _Spread, _Spread] | None = Field(
        None,
        description="The standard deviation of each channel that models divide by, on the same scale. Default: "
        "ImageNet's.",
    )

    @model_validator(mode="after")
    def _possible(self) -> PixelFormat:
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise ValueError(
                f"bands names {len(self.bands)} bands, and models see three channels: name three bands, such as "
                "[3, 2, 1], or one, such as [0], which is seen three times"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(
                f"range is {list(self.range)}: give black first and white second, such as [0, 4095]"
            )
        return self

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
