"""A student: an own convolutional network, trained like any other."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Images (B, 3, H, W) → a map (B, width, H/8, W/8). Its mean is the feature of the image, its cells are patches.

    BatchNorm normalises by the images of one block; what it needs afterwards is measured when the student is done.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width // 4), (width // 4, width // 2), (width // 2, width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        # The last layer is linear, so that features may be negative, as the teachers' are.
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The map."""
        map_BCHW: Tensor = self.last(self.layers(images_BCHW))
        return map_BCHW
