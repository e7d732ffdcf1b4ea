"""What errors of others look like on one line."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from orchestrator.errors import first_line


class Inner(BaseModel):
    rate: float


class Outer(BaseModel):
    parts: list[Inner]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no space\nleft"), "no space"),
        (ValueError("\nlater"), "later"),
        (KeyError(), "KeyError"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_an_error_has_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_of_several_errors_the_first_has_its_place_and_no_value() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"parts": [{"rate": "hush-hush"}, {}]})
    assert first_line(caught.value) == (
        "parts.0.rate: Input should be a valid number, unable to parse string as a number"
    )


def test_an_error_about_the_whole_has_no_place() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("x")
    assert first_line(caught.value) == (
        "Input should be a valid integer, unable to parse string as an integer"
    )
