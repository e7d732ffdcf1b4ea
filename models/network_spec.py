"""What names a network from elsewhere, and its blocks: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_RGB = 3
LIBRARIES = ("module", "timm", "transformers")
# Arguments of `timm.create_model` that say where weights come from, or make a head. A student begins with random
# weights, and a model folder must not name files.
TIMM_RESERVED = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes",
)  # fmt: skip


@dataclass(frozen=True)
class NetworkSpec:
    """What makes a network with random weights.

    Attributes:
        library: one of :data:`LIBRARIES`.
        name: `package.module:callable`, or the name of a model in the library.
        kwargs: arguments of what makes it.
        config: of `transformers`, all that its config.json says; the name is then not looked up.
        num_channels: of its images. timm and transformers are told; a module gets it from `kwargs` as it calls it.
    """

    library: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    num_channels: int = 3

    @property
    def arguments(self) -> dict[str, Any]:
        """`kwargs`, and what tells the library the number of channels where it is not 3."""
        told = {"timm": "in_chans", "transformers": "num_channels"}.get(self.library)
        return (
            dict(self.kwargs)
            if told is None or self.num_channels == _RGB
            else {told: self.num_channels, **self.kwargs}
        )

    def __str__(self) -> str:
        return self.name if self.library == "module" else f"{self.library} {self.name}"


class Blocks(NamedTuple):
    """The blocks whose tokens are taken, counted from 1: of the CLS token and of the patches; None is the last."""

    cls: int | None = None
    patches: int | None = None

    def indices(self, num_blocks: int) -> tuple[int, int]:
        """Both from 0.

        Raises:
            ValueError: there are no such blocks.
        """
        wanted = [num_blocks if block is None else block for block in self]
        for block in wanted:
            if not 1 <= block <= num_blocks:
                raise ValueError(f"there is no block {block}: it has blocks 1 to {num_blocks}")
        return wanted[0] - 1, wanted[1] - 1
