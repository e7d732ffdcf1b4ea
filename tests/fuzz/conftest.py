"""How the targets run: a few seconds each in `make test`, the same every time; as long as wanted in `make fuzz`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes], Path]:
    """Writes a file into a folder that the module's examples share, and says where it is."""
    folder = tmp_path_factory.mktemp("fuzz")

    def write(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return write
