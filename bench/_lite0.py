"""EfficientNet-Lite0's public weights, for the claims that have it as a teacher."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.weights import LITE0, fetch
from orchestrator.storage.cache_folder import cache_folder


def lite0_weights() -> Path:
    """The file efficientnet-lite0.pth in the cache, to be read with weights_only; raises as :func:`fetch`."""
    fetch(LITE0, cache_folder() / "lite0")
    return cache_folder() / "lite0/efficientnet-lite0.pth"
