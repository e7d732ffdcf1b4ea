"""Augmentations of users' packages: changes of each view after the package's own. One class is one. No NumPy here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import SerializeAsAny

from orchestrator.config.extension import Chosen, Extension
from orchestrator.installed import Group

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Augmentation(Extension):
    """Base of augmentations: fields are settings, :meth:`apply` changes one view."""

    group: ClassVar[Group] = "augmentations"
    method: ClassVar[str] = "apply"

    def apply(self, pixels_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """The view as training sees it.

        Args:
            pixels_HWC: uint8 RGB, cropped and distorted; it may be changed in place. It is uint16 where the `pixels` of
                a dataset have a range of more than 8 bits.
            rng: of this view alone. Whoever draws from it only is exact on any number of workers.

        Returns:
            The same type and shape.
        """
        raise NotImplementedError


OwnAugmentation = Annotated[SerializeAsAny[Augmentation], Chosen(Augmentation)]
