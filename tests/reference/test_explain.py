"""What a key means, on the terminal and in an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import UserError
from orchestrator.reference.explain import Explanation, explain, text
from orchestrator.reference.json_schema import schema, schema_text
from orchestrator.reference.page import described, reference, sections
from orchestrator.stages import AnyStage
from orchestrator.stages.registry import kind_of

ROOT = Path(__file__).parents[2]
PIPELINES = [
    ROOT / "conf/full_pipeline.yaml",
    *sorted((ROOT / "conf/examples").glob("*.yaml")),
    *sorted((ROOT / "conf/paper").glob("*.yaml")),
]


def said(path: str) -> str:
    return "\n\n".join(text(each) for each in explain(path))


def test_a_key_says_its_type_default_effect_and_meaning() -> None:
    assert said("stages.pretrain.heads.hidden") == (
        "stages.pretrain.heads.hidden\n"
        "  integer ≥ 1; default 256; when it changes, stages run again\n"
        "\n"
        "  The width of the hidden layers of both heads (DINOv3's 7B: 8192, but 4096 in the iBOT head of its\n"
        "  published code)."
    )
    assert "no stage runs again" in said("elastic.workers")
    assert "  number ≥ 0; required; " in said("stages.pretrain.optimizer.lr.peak")


def test_a_section_lists_its_keys() -> None:
    lines = said("stages.distill.students.any-name").splitlines()
    assert lines[0] == "stages.distill.students.any-name"
    assert any(line.split()[:1] == ["model"] for line in lines)
    assert said("").startswith("A pipeline file\n")
    assert "    curate       Files of one or more datasets" in said("stages")


def test_a_list_of_keys_ends_no_line_within_parentheses() -> None:
    optimizer = said("pretrain.optimizer")
    assert "    lr                 The learning rate by step\n" in optimizer
    betas = (
        "betas The decay rates of AdamW's two moments (DINOv3's published code: 0.9 and 0.99) weight_decay "
    )
    assert betas in " ".join(optimizer.split())
    for model in sections():
        for key in described(model):
            line = text(Explanation(["x"], None, "", [key]), width=10_000)
            assert line.count("(") == line.count(")"), line
            assert line[-1] not in ".:;", line


def test_keys_that_no_model_says_itself_are_explained() -> None:
    assert said("extends") == (
        "extends\n"
        "  path; no default; when it changes, stages run again\n"
        "\n"
        "  The path of a pipeline file that this one extends and overrides, relative to this one's folder."
    )
    assert "\n    extends " in said("")
    assert "pretrain; required; " in said("stages.pretrain.kind")
    assert "  The kind of the stage, such as pretrain." in said("stages.pretrain.kind")


def test_a_key_whose_description_says_what_happens_without_it_has_no_other_default() -> None:
    text = said("stages.pretrain.mix")
    assert "Default: what curate selected." in " ".join(text.split())
    assert "no default" not in text
    assert "; when it changes, stages run again" in text


def test_the_start_of_a_path_may_be_left_out() -> None:
    assert said("pretrain.heads.hidden") == said("stages.pretrain.heads.hidden")
    first, *rest = said("homogeneous").splitlines()
    assert (first, rest[0]) == ("stages.pretrain.homogeneous", "stages.gram_anchor.homogeneous")
    assert said("homogeneous").count("The dataset") == 1


def test_the_reference_has_the_key_that_no_model_has() -> None:
    assert "| `extends` | path |" in reference().partition("## Every stage")[0]


def test_below_a_stages_own_name_a_key_is_explained_for_each_kind_that_has_it() -> None:
    found = explain("stages.my_gram.gram.teacher")
    kinds = ("pretrain", "gram_anchor", "high_res")
    of_each_kind = [[f"stages.{kind}.gram.teacher"] for kind in kinds]
    assert [list(each.paths) for each in found] == of_each_kind
    paths = {path for each in explain("stages.gram.steps") for path in each.paths}
    assert {"stages.pretrain.steps", "stages.gram_anchor.steps", "stages.distill.steps"} <= paths


def test_every_key_can_be_asked_for() -> None:
    for stage in get_args(get_args(AnyStage)[0]):
        for key in described(stage):
            assert said(f"stages.{kind_of(stage)}.{key.name}")
    for section in sections():
        for key in described(section):
            assert key.name in said(key.name), f"{section.__name__}: {key.name}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stages.pretrian", r"no stage kind 'pretrian'.*mean 'stages\.pretrain'"),
        ("stages.pretrain.homogenous", r"no key 'homogenous'.*mean 'stages\.pretrain\.homogeneous'"),
        ("nothing-like-it", "a pipeline file has no key 'nothing-like-it'.*there are: name, seed"),
        (
            "distill.replay",
            "stages.distill has no key 'replay'.*it is now called 'stages.distill.teacher_cache'",
        ),
        ("elastic.hang_s", "elastic has no key 'hang_s'.*it is now called 'elastic.stall_timeout_s'"),
        ("name.x", "name has no keys below it.*it is text"),
        ("extends.x", "extends has no keys below it.*it is path"),
        ("stages.distill.students.a.modl", r"mean 'stages\.distill\.students\.a\.model'"),
    ],
)
def test_wrong_paths(path: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        explain(path)


def test_lines_fit() -> None:
    for width in (60, 100):
        assert max(map(len, text(explain("stages.pretrain")[0], width).splitlines())) <= width


def test_the_commands_print_them() -> None:
    result = CliRunner().invoke(app, ["explain", "heads.hidden"])
    assert result.stdout.startswith("stages.pretrain.heads.hidden\n")
    assert json.loads(CliRunner().invoke(app, ["schema"]).stdout) == schema()


# --- the schema ---------------------------------------------------------------------------------------------------


def mistakes(document: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema())
    return ["/".join(map(str, error.absolute_path)) for error in validator.iter_errors(document)]


def test_the_shipped_schema_is_the_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert (ROOT / "conf/schema.json").read_text() == schema_text(), (
        "make it anew: orchestrator schema > conf/schema.json"
    )


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_shipped_files_fit_it_and_name_it(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == ROOT / "conf/schema.json"
    assert not mistakes(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"nmae": "x"}, ""),
        ({"seed": "one"}, "seed"),
        ({"stages": {"a": {"needs": []}}}, "stages/a"),
        ({"stages": {"curate": {"kind": "curate", "data": "photos", "clusters": 0}}}, "stages/curate"),
        ({"name": None}, "name"),
    ],
)
def test_the_schema_finds_mistakes(change: dict[str, Any], at: str) -> None:
    document = yaml.safe_load(PIPELINES[0].read_text()) | change
    assert at in mistakes(document)


def test_a_file_that_extends_another_needs_only_what_it_changes() -> None:
    assert not mistakes({"extends": "other.yaml", "stages": {"pretrain": {"steps": 3}, "gram": None}})
    assert mistakes({"stages": {"pretrain": {"steps": 3}}})
