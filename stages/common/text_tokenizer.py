"""Tokenizers of texts, as `tokenizer.json` files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
