"""Values that YAML takes for something else than their writer: null, 1 for true, 1e3 for a text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from other_process import said_by

from orchestrator.errors import UserError
from orchestrator.pipeline.load import LoadedPipeline, load

PIPELINE = """\
name: odd
data: {photos: {path: photos}}
stages:
  curate: {kind: curate, data: photos}
  pretrain:
    kind: pretrain
    needs: curate
    model: vit_femto
    steps: 20
    batch_size: 4
    block_size: 2
    optimizer: {lr: {peak: 0.001}}
  distill:
    kind: distill
    needs: [curate, pretrain]
    steps: 20
    batch_size: 4
    block_size: 2
    optimizer: {lr: {peak: 0.001}}
    students: {small: {model: vit_femto}}
    features:
      teachers:
        other: {module: "json:dumps", size: 32}
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "base.yaml"
    path.write_text(PIPELINE)
    return path


def read(path: Path, *overrides: str) -> LoadedPipeline:
    return load(path, overrides, needs_data=False, gather=True)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("seed", "leave the key out for its default"),
        ("elastic", "leave the key out for its default"),
        ("elastic.exact", "leave the key out for its default"),
        ("elastic.max_failures", "leave the key out for its default, 3"),
        ("stages.pretrain.steps", "leave the key out"),
        ("stages.pretrain.crops", "leave the key out for its default"),
        ("stages.distill.students.small", "give it a value, or leave the key out"),
        (
            "stages.distill.features.teachers.other.mean",
            "leave the key out for its default, [0.485, 0.456, 0.406]",
        ),
        (
            "stages.distill.features.teachers.other.std",
            "leave the key out for its default, [0.229, 0.224, 0.225]",
        ),
    ],
)
def test_null_is_refused_where_it_means_nothing(base: Path, key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        read(base, f"{key}=null")
    said = str(caught.value)
    assert f"{key}: null is not a value here: it must be" in said
    assert hint in said


@pytest.mark.parametrize(
    "text",
    [
        "stages: {distill: {features: {teachers: {other: {mean: null}}}}}",
        "stages: {curte: null}",
        "sead: null",
        "elastic: {exact: null}",
    ],
)
def test_null_takes_away_only_what_the_other_file_has(base: Path, text: str) -> None:
    top = base.with_name("top.yaml")
    top.write_text(f"extends: base.yaml\n{text}\n")
    with pytest.raises(UserError) as caught:
        read(top)
    assert f"{top}:2" in str(caught.value)


def test_null_is_taken_where_it_means_something(base: Path) -> None:
    top = base.with_name("top.yaml")
    text = (
        "extends: base.yaml\nstages: {pretrain: {optimizer: {clip_norm: null}}, distill: {features: null}}\n"
    )
    top.write_text(text)
    stages = read(top).spec.stages
    assert stages["pretrain"].optimizer.clip_norm is None  # type: ignore[attr-defined]
    assert stages["distill"].features is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "hint"),
    [("1", "write true"), ("0", "write false"), ("1.0", "write true"), ("2", ""), ("y", ""), ('"1"', "")],
)
@pytest.mark.parametrize("key", ["elastic.exact", "stages.pretrain.crops.flip", "cluster.dashboard"])
def test_a_number_is_neither_true_nor_false(base: Path, key: str, value: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        read(base, f"{key}={value}")
    shown = value.replace('"', "'")
    assert f"{key}: must be true or false, not {shown}" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("value", ["true", "True", "yes", "on"])
def test_yamls_words_for_true_are(base: Path, value: str) -> None:
    assert read(base, f"elastic.exact={value}").spec.elastic.exact is True


@pytest.mark.parametrize(
    ("value", "number"),
    [("1e3", 1000), ("1E3", 1000), ("2.5e3", 2500), ("1.e2", 100), ("+3e0", 3), ("-0e0", 0), ("100e-2", 1)],
)
def test_an_integer_may_have_an_exponent(base: Path, value: str, number: int) -> None:
    assert read(base, f"seed={value}").spec.seed == number
    # Key and record are those of the number.
    assert f"seed: {number}\n" in read(base, f"seed={value}").resolved()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("1.5e-3", "must be an integer, not"),
        ("25e-1", "must be an integer, not 25e-1"),
        ("1e30", "must be less than or equal to"),
        ("1e400", "must be an integer, not 1e400"),
        ("1e999999999", "must be an integer, not 1e999999999"),
        ("e3", "must be an integer, not e3"),
        ("1e3x", "must be an integer, not 1e3x"),
    ],
)
def test_what_is_no_integer_stays_none(base: Path, value: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        read(base, f"seed={value}")


@pytest.mark.parametrize(
    ("value", "number", "hint"),
    [
        ("010", 8, "write 10 or 8"),
        ("-0_17", -15, "write -17 or -15"),
        ("1:30", 90, "write 90"),
        ("12:30:00", 45000, "write 45000"),
        ("1:30.5", 90.5, "write 90.5"),
    ],
)
def test_a_number_that_yaml_takes_for_another_is_refused(
    base: Path, value: str, number: float, hint: str
) -> None:
    top = base.with_name("top.yaml")
    top.write_text(f"seed: {value}\n{PIPELINE}")
    for path, arguments, where in (
        (top, (), f"{top}:1"),
        (base, (f"seed={value}",), "command line `seed=…`"),
    ):
        with pytest.raises(UserError, match=f"YAML takes {value} for the number {number}\n") as caught:
            read(path, *arguments)
        assert f"hint {hint}, or put it in quotes if it is a text" in str(caught.value)
        assert where in str(caught.value)


@pytest.mark.parametrize("value", ["0", "00", "8", "0x10", "0b11", "1_000", "007", "0_7", "+07"])
def test_other_numbers_are_what_they_look_like(base: Path, value: str) -> None:
    assert read(base, f"seed={value}").spec.seed == int(value, 0 if "x" in value or "b" in value else 10)


@pytest.mark.heavy
def test_no_text_takes_long_to_be_told_from_a_number() -> None:
    """A killed process is the failure: these took hours."""
    texts = {
        "quoted": "'a: ' + repr('0' + '1' * 900_000 + 'x')",
        "plain": "'a: 0' + '1' * 900_000 + 'x'",
        "list": "'a: [' + '1, ' * 90_000 + ']' + chr(10) + 'b: ' + repr('x' * 700_000)",
    }
    check = "from orchestrator.config.yaml_bounds import check_size; check_size({} + chr(10), 'x')"
    programs = {name: check.format(text) for name, text in texts.items()}
    assert said_by(programs, 60) == dict.fromkeys(texts, "")


@pytest.mark.parametrize("value", ["0472", "9" * 60])
def test_a_number_among_environment_variables_is_not_shown(base: Path, value: str) -> None:
    top = base.with_name("top.yaml")
    top.write_text(
        f"extends: base.yaml\nelastic: {{resources: {{runtime_env: {{env_vars: {{PIN: {value}}}}}}}}}\n"
    )
    override = f"elastic.resources.runtime_env.env_vars.PIN={value}"
    for path, arguments in ((top, ()), (base, (override,))):
        with pytest.raises(
            UserError, match="a number is too long, or YAML takes it for another one"
        ) as caught:
            read(path, *arguments)
        assert value not in str(caught.value)
        assert "put it in quotes" in str(caught.value)
