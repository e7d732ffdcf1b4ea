"""Commands in the pages exist, are taken as they stand, and print what the pages show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import typer.cli
from pages import (
    ALL_KEYS,
    GENERATED,
    HAND_WRITTEN,
    KEYS,
    ROOT,
    SAMPLE,
    commands,
    each_page,
    joined,
    split,
    typed,
)
from PIL import Image
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.pipeline.load import load


@cache
def command_line() -> Any:
    """All commands; putting them together takes longer than looking one up."""
    return typer.main.get_command(app)


def command_of(words_: list[str], page: Path) -> tuple[Any, list[str]]:
    """The command that a line names, and its arguments."""
    command = command_line()
    rest = words_[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        named = command.commands.get(rest[0])
        assert named is not None, f"{page.name}: orchestrator has no {rest[0]}: {' '.join(words_)}"
        command, rest = named, rest[1:]
    return command, rest


def test_the_page_of_commands_is_up_to_date() -> None:
    """What Typer itself writes; wide, since it folds lines at the width of the terminal."""
    arguments = ["orchestrator.cli", "utils", "docs", "--name", "orchestrator", "--title", "Commands"]
    said = CliRunner().invoke(typer.cli.app, arguments, env={"COLUMNS": "1000"})
    assert said.exit_code == 0, said.output
    assert GENERATED.read_text().strip() == said.output.strip(), "run: make reference"


@each_page(HAND_WRITTEN)
def test_commands_exist_with_their_options(page: Path) -> None:
    for words_ in commands(page, "orchestrator "):
        command, rest = command_of(words_, page)
        options = {
            name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in rest:
            option = word.strip("[]").partition("=")[0]
            if option.startswith("-"):
                assert option in {*options, "--help"}, f"{page.name}: {' '.join(words_)}"
        check_overrides(page, rest)


@each_page(HAND_WRITTEN)
def test_command_lines_of_blocks_are_taken_as_they_stand(page: Path) -> None:
    """Parsed by the command line itself: arguments that are there, options with values of their type."""
    for words_ in typed(page, "orchestrator "):
        command, rest = command_of(words_, page)
        if "--help" not in rest and "--version" not in rest:
            command.make_context(command.name, [word.strip("[]") for word in rest])


# They take a second, and change nothing but the folder that they run in.
_CHEAP = ("explain", "models", "plan", "schema", "status")


def is_cheap(words_: list[str]) -> bool:
    """Whether a line is run below. How devices are best split is measured, which takes minutes."""
    return len(words_) > 1 and words_[1] in _CHEAP and "--devices" not in words_


def cheap() -> Iterator[Any]:
    """Each line of the pages that is run: its words, and what the page shows below it."""
    seen: dict[tuple[str, ...], list[str]] = {}
    for page in HAND_WRITTEN:
        for words_ in typed(page, "orchestrator "):
            if is_cheap(words_):
                seen.setdefault(tuple(words_), []).extend(shown(page, words_))
    for line, below in seen.items():
        yield pytest.param(list(line), below, id=" ".join(line[1:]))


def shown(page: Path, words_: list[str]) -> list[str]:
    """What a console block shows as the output of a command."""
    found: list[str] = []
    for block in re.findall(r"^```console\n(.*?)^```$", joined(page), flags=re.S | re.M):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = part.partition("\n")
            if split(line) == words_:
                found += [each.rstrip() for each in output.split("\n") if each.strip()]
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of: conf/, the tutorial's pipeline.yaml, photos with captions."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "conf").symlink_to(ROOT / "conf")
    (folder / "docs").mkdir()
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    [whole] = re.findall(r"^```yaml\n(name: .*?)^```$", tutorial, flags=re.S | re.M)
    (folder / "pipeline.yaml").write_text(whole)
    photos = folder / "data" / "food"
    photos.mkdir(parents=True)
    rows = ["file,caption,label"]
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg")
        rows.append(f"{number}.jpg,noise {number},{number % 4}")
    (photos / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize(("words_", "below"), list(cheap()))
def test_cheap_commands_run_and_print_what_the_pages_show(
    words_: list[str], below: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`FILE` stands for the sample file; a … in the output that a page shows stands for anything."""
    monkeypatch.chdir(workplace)
    said = CliRunner().invoke(app, [SAMPLE if word == "FILE" else word for word in words_[1:]])
    assert said.exit_code == 0, f"{said.output}\n{said.exception}"
    printed = [line.rstrip() for line in said.output.split("\n")]
    for line in below:
        line = line.replace("542", "40")  # photos of the sample set, and of the workplace
        pattern = ".*".join(map(re.escape, line.split("…")))
        assert any(re.fullmatch(pattern, each) for each in printed), f"{line!r} is not in\n{said.output}"


def check_overrides(page: Path, rest: list[str]) -> None:
    """That what is overridden can be: by loading the file where there is one, else by name."""
    overrides = [word for word in rest if re.fullmatch(r"[a-z_.\-]+=\S+", word) and not word.startswith("-")]
    file = next((word for word in rest if word.endswith(".yaml")), None)
    if file is not None and (ROOT / file).is_file():
        load(ROOT / file, [one for one in overrides if "://" not in one], needs_data=False)
    for one in overrides:
        path = one.partition("=")[0].split(".")
        assert path[0] in KEYS["pipeline"], f"{page.name}: {one}"
        assert path[-1] in ALL_KEYS, f"{page.name}: {one}"
