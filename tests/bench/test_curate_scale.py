"""What `python -m bench curate_scale` measures: every photo once, and of added ones no more; nothing is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import curate_scale


def test_photos_are_made_alike_each_time_and_differ(tmp_path: Path) -> None:
    curate_scale.make_photos(tmp_path / "a", 0, 4)
    curate_scale.make_photos(tmp_path / "b", 2, 4)
    for name in ("0000002.jpg", "0000003.jpg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    small = [np.asarray(Image.open(path).resize((8, 8))) for path in sorted((tmp_path / "a").iterdir())]
    assert len({one.tobytes() for one in small}) == 4


def test_memory_index_and_decodes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curate_scale, "QUICK", (30, 60))
    claim = curate_scale.run(quick=True)
    assert set(claim.arms) == {
        f"{n} photos, {what}" for n in (30, 60) for what in ("first", "with 1 % new photos")
    }
    notes = "\n".join(claim.notes)
    assert "bytes a row" in notes
    assert "GB at 100,000 photos" in notes
    # Besides the photos that the picture of the clusters shows.
    assert claim.unit == "exponent"
