"""Which views of a photograph a step compares, as config; `crops.py` makes them. Imports neither OpenCV nor NumPy."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, model_validator

from orchestrator.config.settings import Settings, in_key_if_set
from orchestrator.data.augmentation import OwnAugmentation

Probability = Annotated[float, Field(ge=0, le=1)]
_Factor = Annotated[float, Field(gt=0, le=1000)]
Range = tuple[_Factor, _Factor]


# Pixels of a view's side.
Side = Annotated[int, Field(ge=1, le=16384)]
MAX_VIEWS = 1024


class CropConfig(Settings):
    """The crops of an image and their augmentations.

    The defaults follow DINOv3 (arXiv 2508.10104), with the kinds of colour jitter of SimCLR (arXiv 2002.05709). Sizes
    are in pixels, scales are shares of the image's area. The first global crop is always blurred and the others rarely,
    as in the papers. DINOv3's published code does the opposite, which is `blur_probability: [0.0, 0.9]`.
    """

    global_size: Side = Field(
        256, description="The side of a global crop, in pixels (DINOv3's published code: 256)."
    )
    local_size: Side = Field(
        112, description="The side of a local crop, in pixels (DINOv3's published code: 112)."
    )
    num_global: int = Field(
        2,
        ge=1,
        le=MAX_VIEWS,
        description="The number of global crops per image (DINOv3, section 3.2: 2).",
    )
    num_local: int = Field(
        8,
        ge=0,
        le=MAX_VIEWS,
        description="The number of local crops per image (DINOv3, section 3.2: 8).",
    )
    global_scale: Range = Field(
        (0.32, 1.0),
        description="The minimum and maximum share of the image's area that a global crop covers, at most 1 "
        "(DINOv3's published code: 0.32 and 1).",
    )
    local_scale: Range = Field(
        (0.05, 0.32),
        description="The minimum and maximum share of the image's area that a local crop covers, at most 1 (DINOv3's "
        "published code: 0.05 and 0.32).",
    )
    aspect: Range = Field(
        (3 / 4, 4 / 3),
        description="The minimum and maximum aspect ratio (width / height) of a crop, sampled log-uniformly "
        "(3/4 and 4/3, as in GoogLeNet, arXiv 1409.4842).",
    )
    flip: bool = Field(False, description="Whether views are flipped horizontally, with probability 0.5.")
    jitter_probability: Probability = Field(
        0.8,
        description="The probability of colour jitter: a change of brightness, contrast, saturation and hue (DINOv3's "
        "published code: 0.8).",
    )
    brightness: float = Field(
        0.4,
        ge=0,
        le=1,
        description="The maximum relative change of brightness (DINOv3's published code: 0.4).",
    )
    contrast: float = Field(
        0.4,
        ge=0,
        le=1,
        description="The maximum relative change of contrast (DINOv3's published code: 0.4).",
    )
    saturation: float = Field(
        0.2,
        ge=0,
        le=1,
        description="The maximum relative change of saturation (DINOv3's published code: 0.2).",
    )
    hue: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="The maximum rotation of the hue, as a share of the colour circle (DINOv3's published code: 0.1).",
    )
    gray_probability: Probability = Field(
        0.2,
        description="The probability that a view is converted to grayscale (DINOv3's published code: 0.2).",
    )
    blur_probability: tuple[Probability, Probability] = Field(
        (1.0, 0.1),
        description="The probability of Gaussian blur for the first global crop and for the other global crops "
        "(DINOv2, as DINOv3's paper says: 1 and 0.1).",
    )
    local_blur_probability: Probability = Field(
        0.5, description="The probability of Gaussian blur for a local crop (DINOv3's published code: 0.5)."
    )
    blur_sigma: Range = Field(
        (0.1, 2.0),
        description="The minimum and maximum standard deviation of Gaussian blur, in pixels of the finished view "
        "(SimCLR, arXiv 2002.05709: 0.1 and 2).",
    )
    solarize_probability: Probability = Field(
        0.2,
        description="The probability that the second global crop is solarized (DINOv3's published code: 0.2). Other "
        "views never are.",
    )
    gram_size: Side | None = Field(
        None,
        description="The side of the Gram teacher's undistorted views, in pixels. Default: the Gram teacher sees the "
        "global crops.",
    )

    augmentations: tuple[OwnAugmentation, ...] = in_key_if_set(
        (),
        description="Augmentations of users' packages, applied to every view after the others, in this order: a name, "
        "or a mapping with the name as `use` and its settings (docs/extending.md). A Gram teacher's views have none.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> CropConfig:
        for name in ("global_scale", "local_scale", "aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high or (name.endswith("scale") and high > 1):
                raise ValueError(f"{name} is {low} to {high}: give the smaller first, scales at most 1")
        return self

    @property
    def num_bytes(self) -> int:
        """Of one image's views, uint8; without those for a Gram teacher."""
        pixels = self.num_global * self.global_size**2 + self.num_local * self.local_size**2
        return 3 * pixels

    @property
    def min_side(self) -> int:
        """The shorter side, in pixels, below which a decoded photograph would have to be enlarged."""
        needs = [max(self.global_size, self.gram_size or 0) / math.sqrt(self.global_scale[0])]
        if self.num_local:
            needs.append(self.local_size / math.sqrt(self.local_scale[0]))
        return math.ceil(max(needs))
