"""The documents say what the code does: keys, commands, options, paths, anchors and tests that they name exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pages import (
    ALL_KEYS,
    KEYS,
    LIVING,
    PAGES,
    ROOT,
    SAMPLE,
    commands,
    each_page,
)
from pydantic import BaseModel, ValidationError, create_model
from typer.testing import CliRunner

import orchestrator
from orchestrator import installed
from orchestrator.cli import app
from orchestrator.config import yaml_source
from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Pipeline, StageSpec
from orchestrator.errors import UserError
from orchestrator.pipeline.load import load
from orchestrator.reference.model_table import model_rows
from orchestrator.reference.page import reference, sections
from orchestrator.simulation.costs import read_costs
from orchestrator.simulation.trace_file import read_trace
from orchestrator.stages import AnyStage
from orchestrator.stages.align_text.config import AlignText
from orchestrator.stages.base import TrainStage

# Other things have keys, too: spot traces and costs.
_OTHER_KEYS = {"traces.md"}
# Files that a run, a cloud or another project makes.
_MADE = {
    "artifact.json", "config.json", "curves.png", "lineage.json", "manifest.json", "pointer.json", "tokenizer.json",
    "model.safetensors", "text.lock", "text_maps.png", "chaos.md", "pipeline.yaml",
    "us-west-2a_v100_8.json", "other.yaml", "drawn.json", "models.json", "report.json",
    "published.json", "artifacts.json", "sbom.cdx.json", "table.json", "scores.json",
    "head.safetensors", "_gtFine_labelTrainIds.png", "account.json", "cameras.json", "preprocessing.json",
    "watch.json",
}  # fmt: skip
_STAGES = get_args(get_args(AnyStage)[0])


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def quoted(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def tree() -> frozenset[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return frozenset(listed.stdout.split("\n")) - {""}


# --- the reference ----------------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference(), (
        "run: python -m orchestrator.reference.page > docs/reference.md"
    )


def test_the_reference_has_every_key_of_the_schema() -> None:
    """Asked of the models themselves, not of what made the document."""
    text = (ROOT / "docs" / "reference.md").read_text()
    parts = {part.partition("\n")[0]: part for part in re.split(r"^##+ ", text, flags=re.M)}
    shared = parts["Every stage"] + parts["Every stage that trains"]
    for stage in _STAGES:
        kind = get_args(stage.model_fields["kind"].annotation)[0]
        for name, field in stage.model_fields.items():
            fixed = field.annotation in (type(None), tuple[()])
            if not fixed:
                assert f"| `{field.alias or name}` |" in shared + parts[f"`kind: {kind}`"], (kind, name)
    for model in sections():
        for name, field in model.model_fields.items():
            if field.annotation is not type(None):
                assert f"| `{field.alias or name}` |" in parts[model.__name__], (model, name)


@pytest.mark.parametrize(
    "model",
    [Pipeline[AnyStage], StageSpec, TrainStage, *_STAGES, *sections()],
    ids=lambda model: model.__name__[:20],
)
def test_every_key_has_a_description_that_stands_alone(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if name == "kind" and model is not StageSpec:
            continue  # narrowed to one word
        said = field.description or ""
        assert len(said.split()) >= 3, f"{name} has no description"
        assert said[0].isupper() or said[0] in "`∞", f"{name}: {said!r} is not a sentence"
        assert said.endswith("."), f"{name}: {said!r} is not a sentence"


# --- blocks -----------------------------------------------------------------------------------------------------


def fenced(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block between fences."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), flags=re.S | re.M)


def indented(page: Path) -> list[str]:
    """The blocks that are indented instead."""
    return re.findall(r"(?:\A|\n\n)((?: {4,}.*(?:\n|\Z)|\n(?= {4}))+)", prose(page))


@each_page()
def test_every_block_names_its_language(page: Path) -> None:
    """A block without one is neither loaded nor run by a test."""
    for language, text in fenced(page):
        assert language in {"console", "json", "python", "sh", "text", "toml", "yaml"}, text


@each_page(LIVING)
def test_no_part_of_a_pipeline_file_is_in_another_block(page: Path) -> None:
    for text in [*indented(page), *(text for language, text in fenced(page) if language == "text")]:
        try:
            found = yaml.safe_load(textwrap.dedent(text))
        except yaml.YAMLError:
            continue
        if isinstance(found, dict):
            kinds = [value for value in found.values() if isinstance(value, dict) and "kind" in value]
            assert not kinds, text
            assert ALL_KEYS.isdisjoint(found), text


@each_page(LIVING)
def test_json_toml_and_python_blocks_are_such(page: Path) -> None:
    """Python's names of this package exist; a block may hold several JSON values."""
    for language, text in fenced(page):
        if language == "json":
            rest = text.strip()
            while rest:
                rest = rest[json.JSONDecoder().raw_decode(rest)[1] :].lstrip()
        elif language == "toml":
            tomllib.loads(text)
        elif language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orchestrator"):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, one.name) for one in node.names), text
                named = node.value if isinstance(node, ast.Attribute) else None
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(named, ast.Name)
                    and named.id == "orchestrator"
                ):
                    assert node.attr in orchestrator.__all__, f"{page.name}: orchestrator.{node.attr}"


def test_traces_and_costs_of_the_pages_are_read(tmp_path: Path) -> None:
    readers = {
        "orchestrator-trace": read_trace,
        "orchestrator-costs": lambda path: read_costs(path, ("pretrain", "distill")),
    }
    found = [text for language, text in fenced(ROOT / "docs" / "traces.md") if language == "json"]
    assert {json.loads(text)["format"] for text in found} == readers.keys()
    for text in found:
        (tmp_path / "read.json").write_text(text)
        readers[json.loads(text)["format"]](tmp_path / "read.json")


# --- keys -------------------------------------------------------------------------------------------------------


def blocks() -> Iterator[Any]:
    for page in PAGES:
        for number, text in enumerate(text for language, text in fenced(page) if language == "yaml"):
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


@pytest.fixture
def own_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package in examples/ is there, with the name of its metric."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv(installed.REGISTERED, "metrics/effective_rank=field_kit.metric:EffectiveRank")
    installed.forget()
    yield
    monkeypatch.undo()
    installed.forget()


@pytest.mark.parametrize("text", list(blocks()))
@pytest.mark.usefixtures("own_package")
def test_every_yaml_block_is_loaded(text: str, tmp_path: Path) -> None:
    """A whole pipeline file as it is; a part of one within the sample file."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    data = yaml_source.read(path, []).data
    if "stages" in data:
        load(path, needs_data=False)
        return
    for key, value in data.items():
        refusals: list[str] = []
        for whole in completed(key, value):
            path.write_text(yaml.safe_dump(whole))
            try:
                mistakes = load(path, needs_data=False, gather=True).mistakes
            except UserError as error:
                mistakes = (error,)
            # Data sets of metrics are looked at in any case, and are not here.
            if all(re.search(r"metrics\.\d+\.data$", str(error.where)) for error in mistakes):
                break
            refusals += map(str, mistakes)
        else:
            pytest.fail(f"no pipeline takes {key}: {value}\n" + "\n".join(refusals))


def completed(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """Pipelines that have this part of a file in them; the rest is the sample file's, as far as it is needed."""
    whole = yaml.safe_load((ROOT / SAMPLE).read_text())
    stages = whole["stages"]
    if isinstance(value, dict) and "kind" in value:
        yield whole | {"stages": upstream(stages | {key: value}, key)}
    elif key in KEYS["pipeline"]:
        yield whole | {key: value}
    else:
        for name, stage in stages.items():
            if key in KEYS[stage["kind"]]:
                yield whole | {"stages": upstream(stages | {name: stage | {key: value}}, name)}


def upstream(stages: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The stages that a stage needs, directly or not, and itself."""
    needs = stages[name].get("needs", [])
    found: dict[str, Any] = {}
    for need in [needs] if isinstance(needs, str) else needs:
        found |= upstream(stages, need)
    return found | {name: stages[name]}


def taken(key: str, value: Any) -> bool:
    """Whether a section of the schema has such a key, and it takes such a value."""
    for model in (Pipeline[AnyStage], *_STAGES, *sections()):
        for name, field in model.model_fields.items():
            if key in (name, field.alias):
                try:
                    # The key alone: what it has to do with others is no matter here.
                    create_model("One", **{name: (field.annotation, field)}).model_validate({key: value})  # type: ignore[call-overload]
                except ValidationError:
                    continue
                return True
    return False


@each_page(LIVING)
def test_settings_that_are_quoted_with_a_value_are_taken(page: Path) -> None:
    """`window: 4`, `elastic: {exact: true}`: in the schema, with that value."""
    for text in quoted(page):
        said = re.fullmatch(r"([a-z_]+): (\S.*)", text)
        if not said or said[1] not in ALL_KEYS:
            continue
        value = yaml.safe_load(said[2].replace("…", "x"))
        if page.name == "reference.md" and said[1] == "kind":
            continue
        assert taken(said[1], value), f"{page.name}: `{text}`"


@each_page()
def test_every_table_begins_with_its_head(page: Path) -> None:
    """A blank line ends a table: rows below it are none."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), flags=re.M):
        assert re.match(r"\|.*\n\|[-:| ]+\|\n", table), f"{page.name}: {table}"


@each_page(LIVING)
def test_tables_of_settings_have_keys_of_the_schema(page: Path) -> None:
    if page.name in _OTHER_KEYS:
        return
    for table in re.findall(
        r"^\| *(?:setting|option|key) *\|.*\n\|[-| :]+\n((?:\|.*\n)+)", prose(page), flags=re.M
    ):
        for row in table.strip().split("\n"):
            for text in re.findall(r"`([^`]+)`", row.split("|")[1]):
                key = text.partition(":")[0].split(".")[-1]
                # `extends` is the loader's, before there is a pipeline.
                assert key in ALL_KEYS | {"extends"}, f"{page.name}: {text}"


@each_page(LIVING)
def test_keys_with_their_section_exist(page: Path) -> None:
    """`elastic.workers`, `stages.NAME.steps`, `gram.teacher`."""
    for text in quoted(page):
        head = text.partition(".")[0]
        if not re.fullmatch(r"[a-z_]+(\.[A-Za-z_]+)+", text) or head not in ALL_KEYS | {"stages"}:
            continue
        # Modules, files, and the attributes of what a stage is given.
        if (
            (ROOT / head).is_dir()
            or head in ("context", "ray", "torch")
            or text in _MADE
            or text.endswith(".py")
            or (ROOT / text).exists()
        ):
            continue
        assert text.split(".")[-1] in ALL_KEYS, f"{page.name}: `{text}`"


@each_page(LIVING)
def test_every_name_that_is_quoted_occurs_somewhere(page: Path) -> None:
    """A name that code, config and tests do not have any more is a name of what is gone."""
    known = words()
    for text in quoted(page):
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", text):
            assert text in known, f"{page.name}: `{text}` is nowhere in the code"


@cache
def words() -> frozenset[str]:
    kinds = (".py", ".yaml", ".toml", ".service", "Makefile", "setup", "Dockerfile")
    found: set[str] = set()
    for name in tree():
        if name.endswith(kinds) and (ROOT / name).is_file():
            found |= set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", (ROOT / name).read_text(errors="ignore")))
    return frozenset(found)


# --- messages -----------------------------------------------------------------------------------------------------


_BETWEEN = "\0"


def messages() -> str:
    """Every text in the code, one after the other; … stands for what is put into it when it runs."""
    found: list[str] = []
    for name in sorted(tree()):
        if re.match(r"(orchestrator|stages|models)/.*\.py$", name) and (ROOT / name).is_file():
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(map(_literal, node.values)))
                else:
                    found.append(_literal(node))
    return _BETWEEN.join(found)


def _literal(node: ast.AST) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def test_messages_that_are_explained_are_still_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### `(.*)`$", page, flags=re.M)
    assert len(headings) >= 30
    assert len(headings) == len(re.findall(r"^### ", page, flags=re.M)), "a heading is not a message"
    said = messages()
    for heading in headings:
        pattern = f"[^{_BETWEEN}]+?".join(map(re.escape, heading.strip("…").split("…")))
        assert re.search(pattern, said), f"no code says: {heading}"


@each_page(LIVING)
def test_modules_that_are_run_and_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z\-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for line in commands(page, "make [a-z]"):
        assert line[1] in targets, f"{page.name}: {' '.join(line)}"
    for line in commands(page, r"python -m (?:bench|orchestrator|tests)"):
        if line[2] == "bench":
            names = line[3:4]
            assert all((ROOT / "bench" / name).is_dir() or (ROOT / "bench" / f"{name}.py").is_file() for name in names
                       if name.islower()), f"{page.name}: {' '.join(line)}"  # fmt: skip
        else:
            assert importlib.util.find_spec(line[2]) is not None, f"{page.name}: {line[2]}"


# --- paths, anchors, tests --------------------------------------------------------------------------------------


@each_page(LIVING)
def test_paths_exist(page: Path) -> None:
    files = tree()
    names = {part for file in files for part in (file, Path(file).name)}
    for text in quoted(page):
        if not re.fullmatch(r"[\w./\-]+\.(py|md|yaml|json|svg|png|toml|lock|service)", text):
            continue
        if Path(text).name in _MADE or text in names:
            continue
        assert any(file.endswith(f"/{text}") for file in files), f"{page.name}: {text}"
    for text in quoted(page):
        folder = text.rstrip("/")
        if re.fullmatch(
            r"(docs|conf|bench|tests|orchestrator|stages|models|objectives|scripts)(/[\w.\-]+)*/?", text
        ):
            assert (ROOT / folder).exists() or any(file.startswith(f"{folder}.") for file in files), (
                f"{page.name}: {text}"
            )


@each_page()
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", prose(page)):
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}#{anchor}"


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page(LIVING)
def test_tests_that_are_named_exist(page: Path) -> None:
    defined = frozenset(
        name
        for file in tree()
        if file.startswith("tests/") and file.endswith(".py") and (ROOT / file).is_file()
        for name in re.findall(r"def (test_\w+)", (ROOT / file).read_text())
    )
    for text in quoted(page):
        for name in re.findall(r"::(test_\w+)", text):
            assert name in defined, f"{page.name}: {name}"


# --- figures that code gives ------------------------------------------------------------------------------------


def test_the_table_of_models_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    for row in model_rows():
        wanted = f"| {row['params']:,} | {row['gflops_256']:,.2f} | {row['gflops_512']:,.2f} |"
        line = next(line for line in text.split("\n") if line.startswith(f"| `{row['name']}` |"))
        assert wanted in line, row["name"]


def test_the_lines_of_the_elastic_layer_are_about_as_many_as_its_page_says() -> None:
    page = ROOT / "docs" / "elastic.md"
    rows = re.findall(r"^\|.*\| ((?:`[a-z_]+`(?:, )?)+) \| ([\d,]+) \|$", page.read_text(), flags=re.M)
    assert len(rows) == 7
    for files, said in rows:
        paths = [
            ROOT / "orchestrator" / "elastic" / f"{name}.py" for name in re.findall(r"`([a-z_]+)`", files)
        ]
        lines = sum(len(path.read_text().split("\n")) for path in paths)
        assert lines == pytest.approx(int(said.replace(",", "")), rel=0.15), files


def test_the_plan_at_paper_scale_is_what_plan_prints() -> None:
    """Every line of the block in docs/paper-scale.md, but for blanks at its end."""
    text = (ROOT / "docs" / "paper-scale.md").read_text()
    part = text.partition("## The plan of the 7B")[2].partition("![")[0]
    said = CliRunner().invoke(app, ["plan", str(ROOT / "conf" / "paper" / "dinov3_7b.yaml")]).output
    printed = {line.rstrip() for line in said.split("\n")}
    lines = [line.strip() for line in part.strip().split("\n") if line.strip()]
    assert len(lines) > 20
    for line in lines:
        assert line in printed, line


@pytest.mark.parametrize(
    ("name", "heading", "model"), [("elastic", "Settings", Elastic), ("text", "Options", AlignText)]
)
def test_defaults_in_tables_are_those_of_the_schema(name: str, heading: str, model: type[BaseModel]) -> None:
    """A default in words, such as "none", is one that the schema leaves open."""
    part = (ROOT / "docs" / f"{name}.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| (.*?) \| ", part, flags=re.M)
    assert len(rows) >= 6
    for keys_, said in rows:
        for key in re.findall(r"`([a-z_]+)`", keys_):
            default = model.model_fields[key].get_default(call_default_factory=True, validated_data={})
            if default is None or default == () or isinstance(default, BaseModel):
                assert not re.search(r"[\d`]", said), f"{key}: {said}, and the schema leaves it open"
            else:
                value = yaml.safe_load(said.strip("`"))
                assert value == (list(default) if isinstance(default, tuple) else default), f"{key}: {said}"
