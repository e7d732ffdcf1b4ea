"""What pictures look like is remembered for the decoders that were asked."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import simplejpeg

from orchestrator.data.curation.signatures import SignatureCache

_DIGEST = "ab" * 32


@pytest.mark.parametrize("decoder", [cv2, PIL, simplejpeg])
def test_another_version_of_a_decoder_decodes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: object
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    first = SignatureCache(10**6, None)
    first.note(_DIGEST, np.zeros((40, 50, 3), np.uint8), 100, 0)
    first.save()

    def is_known() -> bool:
        cache = SignatureCache(10**6, None)
        cache.load([_DIGEST])
        return cache.find(_DIGEST) is not None

    assert is_known()
    monkeypatch.setattr(decoder, "__version__", "another")
    assert not is_known()
