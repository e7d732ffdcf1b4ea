"""A JSON file as a checked, frozen model; every mistake in it is one UserError with its line."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.config.validation_errors import validation_errors
from orchestrator.config.yaml_source import Document, KeyPath, json_document, read_text
from orchestrator.errors import UserError, joined

# Years of spot prices are a few megabytes.
_MAX_BYTES = 16 << 20

M = TypeVar("M", bound=BaseModel)


class JsonFile:
    """The values of a JSON file that can say where they were written.

    Args:
        path: the file.
        what: it is, for messages: `trace`, `costs file`.

    Raises:
        UserError: no such file, too large, not UTF-8, or not JSON; names the line.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._text = read_text(path, what, _MAX_BYTES, "*.json")
        try:
            self.data: Any = json.loads(self._text, parse_constant=_refuse)
        except json.JSONDecodeError as error:
            where = f"{path}:{error.lineno}:{error.colno}"
            raise UserError(f"the {what} is not JSON: {error.msg.lower()}", where=where) from None
        except ValueError as error:
            raise UserError(f"the {what} is not JSON: {error}", where=str(path)) from None
        except RecursionError:
            raise UserError(f"the {what} is nested too deeply", where=str(path)) from None
        if "\\ud" in self._text.lower() and not _is_text(self.data):
            raise UserError(f"the {what} contains an unpaired surrogate, such as \\ud800", where=str(path))

    def where(self, keys: KeyPath = ()) -> str:
        """`file:line  a.b.3` of the value at `keys`, or of the nearest value around it."""
        return self._document.where(keys, value=False)

    def parse(self, model: type[M]) -> M:
        """The whole file as a `model`.

        Raises:
            UserError: what does not fit, all of it in one.
        """
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            raise joined(validation_errors(error, self._document, model)) from None

    @cached_property
    def _document(self) -> Document:
        """With the line of each value; made only for an error, since the YAML parser knows lines but is slow."""
        return json_document(self.path, self._text, self.data, f"the {self.what}")


def _is_text(data: Any) -> bool:
    """Whether all texts in it are whole characters; JSON can write halves of them."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")
