"""Texts that users read are plain English: sentences that stand alone, without words that need a dictionary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import typer

from orchestrator.cli import app
from orchestrator.config.schema import Pipeline, StageSpec
from orchestrator.reference.json_schema import EXTENDS
from orchestrator.reference.page import prose, sections
from orchestrator.simulation.costs import Costs, StageCosts
from orchestrator.simulation.trace_file import TraceSpec
from orchestrator.stages import AnyStage
from orchestrator.stages.base import TrainStage

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_STAGES = get_args(get_args(AnyStage)[0])
MODELS: list[Any] = [
    Pipeline[AnyStage],
    StageSpec,
    TrainStage,
    *_STAGES,
    *sections(),
    Costs,
    StageCosts,
    TraceSpec,
]
# What not to write → what to write.
BETTER = {
    r"fewest": "the minimum number of",
    r"for ever": "indefinitely, always",
    r"reckon\w*": "estimate, compute",
    r"mend(s|ed|ing)?": "fix, correct, repair",
    r"whoever": "anyone who, the process that",
    r"be had": "be available",
    r"anew": "again",
    r"in the place of": "instead of",
    r"as there are": "optionally, if there are any",
    r"to whom": "the name of what is meant",
    r"nobody but": "only",
    r"sign of life": "heartbeat",
    r"such a one": "it, the thing by its name",
    r"whatever becomes": "regardless of",
    r"(of|than) ours": "of this package, than this package",
    r"no longer than": "at most",
    r"and is none": "but is not one",
    r"belongs? into": "belongs in",
    r"as ever": "as before, unchanged",
    r"to go on with": "to continue with, that continues",
    r"(?-i:Of) (an?|several)": "With, For or In a …, at the start of a sentence",
    r"(?<!here\s)(is|are) no (?!longer\b|more\b|less\b|better\b|reason\b|limit\b|remedy\b|recovery\b)\w+": "is not a …",
    r"(one( row| question)?|an? \w+) a (line|row|column|folder|student|machine|picture|photo|step)": "one … per",
}
_WORDS = re.compile(r"\b(" + "|".join(BETTER).replace(" ", r"\s+") + r")\b", re.IGNORECASE)


class Text(NamedTuple):
    """A text that users read, and `file:line` where it begins."""

    where: str
    text: str


def old_words(where: str, text: str) -> list[str]:
    """The words of a text that have better ones, each with its file and line."""
    file, _, first = where.partition(":")
    found = []
    for match in _WORDS.finditer(text):
        line = int(first or 1) + text.count("\n", 0, match.start())
        word = " ".join(match[0].split())
        better = next(new for old, new in BETTER.items() if re.fullmatch(old, word, re.IGNORECASE))
        found.append(f"{file}:{line}: {word!r}: write {better}")
    return found


def no_sentences(where: str, text: str) -> list[str]:
    """The paragraphs of a text that do not begin with a capital letter, or do not end with a full stop."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        start = re.sub(r"\[/?\w+\]", "", paragraph)[:1]
        if start.isalpha() and not start.isupper():
            found.append(f"{where}: does not begin with a capital letter: {paragraph[:60]!r}")
        if not paragraph.rstrip().endswith((".", ":")):
            found.append(f"{where}: does not end with a full stop: {paragraph[-60:]!r}")
    return found


# --- where the texts are ----------------------------------------------------------------------------------------


@cache
def sources() -> tuple[Path, ...]:
    """The files of the package; the folders that are links in it stand beside it."""
    folders = ("orchestrator", "stages", "models", "objectives")
    found = {path.resolve(): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}
    return tuple(path for path in found if path.is_relative_to(ROOT))


@cache
def texts() -> tuple[tuple[str, str], ...]:
    return tuple((str(path.relative_to(ROOT)), path.read_text()) for path in sources())


def place(text: str) -> str:
    """File and line at which a text begins in the source."""
    start = text.strip().partition("\n")[0][:24]
    found = ((file, source.find(start), source) for file, source in texts())
    return next(
        (f"{file}:{1 + source.count(chr(10), 0, at)}" for file, at, source in found if at >= 0),
        "orchestrator",
    )


def help_texts() -> Iterator[Text]:
    """Every text of `--help`: of commands, options and arguments."""

    def walk(command: Any) -> Iterator[str]:
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for below in getattr(command, "commands", {}).values():
            yield from walk(below)

    for text in walk(typer.main.get_command(app)):
        if text:
            yield Text(place(text), text)


def descriptions() -> Iterator[Text]:
    """What every key of a pipeline file, of a file of costs and of a trace says of itself."""
    yield Text(place(EXTENDS), EXTENDS)
    for model in MODELS:
        for field in model.model_fields.values():
            if field.description:
                yield Text(place(field.description), field.description)


def sections_prose() -> Iterator[Text]:
    """What the sections say of themselves in the reference, the schema and `explain`."""
    for model in MODELS:
        if text := prose(model):
            yield Text(place(text), text)


def literals() -> Iterator[Text]:
    """Every text in the code that is no docstring: errors, hints, lines of logs and terminals."""
    for path in sources():
        tree = ast.parse(path.read_text())
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                yield Text(f"{path.relative_to(ROOT)}:{node.lineno}", node.value)


# --- the tests --------------------------------------------------------------------------------------------------


def test_help_is_of_whole_sentences() -> None:
    found = list(help_texts())
    assert len(found) > 50
    assert [said for text in found for said in (*no_sentences(*text), *old_words(*text))] == []


def test_descriptions_are_of_whole_sentences() -> None:
    found = list(descriptions())
    assert len(found) > 250
    assert all(":" in text.where for text in found), "each is found in the source"
    assert [said for text in found for said in (*no_sentences(*text), *old_words(*text))] == []


def test_sections_are_of_whole_sentences() -> None:
    found = list(sections_prose())
    assert len(found) > 20
    assert [said for text in found for said in (*no_sentences(*text), *old_words(*text))] == []


def test_errors_and_logs_have_todays_words() -> None:
    found = list(literals())
    assert len(found) > 1000
    assert [said for text in found for said in old_words(*text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_have_todays_words(page: Path) -> None:
    assert old_words(f"{page.relative_to(ROOT)}:1", page.read_text()) == []


def test_old_words_are_found_with_file_and_line() -> None:
    assert old_words("a.md:3", "Nothing lasts.\nIt waits for\never, with the fewest.") == [
        "a.md:4: 'for ever': write indefinitely, always",
        "a.md:5: 'fewest': write the minimum number of",
    ]
    assert old_words("a.md:1", "Recommended: amend `mended_files`, forever, with a shadow.") == []


def test_what_is_no_sentence_is_found() -> None:
    assert no_sentences("a.py:7", "Hourly price per machine; overrides the trace.") == []
    assert no_sentences("a.py:7", "of a machine an hour") == [
        "a.py:7: does not begin with a capital letter: 'of a machine an hour'",
        "a.py:7: does not end with a full stop: 'of a machine an hour'",
    ]
