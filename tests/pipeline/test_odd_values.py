"""Whatever stands in a pipeline file: it loads, or it is one UserError of a sensible length. Never anything else."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.config.schema import Pipeline
from orchestrator.config.settings import _NoBoolean
from orchestrator.errors import UserError, nearest
from orchestrator.pipeline.load import load
from orchestrator.stages import AnyStage

ROOT = Path(__file__).parents[2]
FULL = yaml.safe_load((ROOT / "conf" / "full_pipeline.yaml").read_text())


def said(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load(path, overrides, needs_data=False)
    return str(raised.value)


def _changed(where: str, value: str) -> str:
    """The full pipeline's text with one value replaced, as written."""
    data = copy.deepcopy(FULL)
    *parents, last = where.split(".")
    inside = data
    for part in parents:
        inside = inside.setdefault(part, {})
    inside[last] = "PLACE"
    return yaml.safe_dump(data, sort_keys=False).replace("PLACE", value)


BAD = {
    "data.food.max_pixels": ["0", "-1", ".nan", "1.5", "9999999999999"],
    "elastic.workers": ["0", "-3", str(2**64), ".inf", "[1, 1e30]", "[4, 2]", "[]", "[1, 2, 3]"],
    "elastic.checkpoint_every_s": [".nan", ".inf", "-1", "0", "1" + "0" * 40],
    "elastic.keep_checkpoints": ["0", "1" + "0" * 30, ".inf"],
    "elastic.resize_share": [".nan", "2", "-0.1"],
    "elastic.max_skipped_updates": ["-1", "1.5", ".nan", "1" + "0" * 30],
    "seed": ["1" + "0" * 30, ".nan", "0.5"],
    "stages.curate.clusters": ["0", ".nan", "1" + "0" * 30],
    "stages.curate.near_duplicate": [".nan", ".inf", "-1", "1000"],
    "stages.curate.sample": [".nan", "-1", "0", "1.5", "1" + "0" * 30],
    "stages.pretrain.steps": ["0", "-1", ".inf", "1" + "0" * 30],
    "stages.pretrain.optimizer.lr.peak": [".nan", ".inf", "-1.0e-3", "1.0e+300"],
    "stages.pretrain.optimizer.lr.warmup_steps": ["100000", "-1", "1" + "0" * 30],
    "stages.pretrain.optimizer.betas": ["[0.9, 2]", "[-0.1, 0.9]", "[0.9, .nan]", "[1.0, 0.9]"],
    "stages.pretrain.optimizer.weight_decay": [".nan", "-1", ".inf"],
    "stages.pretrain.optimizer.clip_norm": [".nan", "0", "-1"],
    "stages.pretrain.ema": ["{peak: 2}", "{peak: .nan}", "{peak: -0.1}"],
    "stages.pretrain.teacher_temperature": ["{peak: 0}", "{peak: 0.07, warmup_steps: 2}", "{peak: .inf}"],
    "stages.pretrain.mask_ratio": ["[0.5, 0.1]", "[-1, 0.5]", "[0.1, 2]", "[.nan, 0.5]"],
    "stages.pretrain.crops.global_size": ["1" + "0" * 30, "1000000", "0", ".nan"],
    "stages.pretrain.crops.num_local": ["1000000", "-1"],
    "stages.pretrain.heads.dino_prototypes": ["1" + "0" * 30, "0", ".inf"],
    "stages.pretrain.max_unreadable": [".nan", "2", "-1"],
    "stages.high_res.resolutions": ["[{global_size: -32, local_size: 16, p: 1}]"],
    "stages.distill.teacher_gpus": [".nan", "0", ".inf"],
    "stages.distill.students.vit-nano.optimizer": ["{lr: {peak: 0.1, warmup_steps: 99999}}"],
    "stages.align_text.optimizer.lr.warmup_steps": ["99999"],
    "stages.align_text.text.dim": ["1" + "0" * 30],
}


@pytest.mark.parametrize(
    ("where", "value"), [(where, value) for where, values in BAD.items() for value in values]
)
def test_numbers_that_cannot_work_are_refused_with_file_and_line(
    where: str, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(_changed(where, value))
    message = said(path)
    section = where.rsplit(".", 1)[0] if where.count(".") > 1 else where
    assert f"at   {path}:" in message
    assert section.split(".")[0] in message
    assert max(len(line) for line in message.splitlines()) < 1200


BOOLEANS = {
    "seed": "seed: must be an integer, not true",
    "stages.pretrain.steps": "stages.pretrain.steps: must be an integer, not true",
    "stages.pretrain.optimizer.lr.peak": "must be a number, not true",
    "stages.pretrain.optimizer.weight_decay": "weight_decay: must be a number, not true",
    "stages.pretrain.optimizer.clip_norm": "must be a number, not true",
    "stages.curate.sample": "must be an integer; or must be a number, not true",
    "stages.distill.teachers": "must be an integer; or must be 'auto', not true",
    "elastic.wait_for_workers_s": "must be a number, not true",
    "elastic.resources.memory": "must be an integer, not true",
}


@pytest.mark.parametrize("where", BOOLEANS)
def test_booleans_are_no_numbers(where: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(_changed(where, "true"))
    message = said(path)
    assert BOOLEANS[where] in message
    assert f"at   {path}:" in message
    assert "hint write 1 if you mean that number" in message
    path.write_text(_changed("name", "odd"))
    message = said(path, f"{where}=false")
    assert f"at   command line `{where}=false`" in message
    assert "hint write 0 if you mean that number" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("elastic.workers=true", "must be a number, two numbers such as [1, 4], or auto, not True"),
        ("elastic.workers=[true, 2]", "elastic.workers.0: must be an integer, not true"),
        ("stages.pretrain.optimizer.betas=[0.9, true]", "betas.1: must be a number, not true"),
        (
            "stages.distill.students.vit-nano.zero_stage=true",
            "zero_stage: must be auto or 0 or 1 or 2 or 3, not true",
        ),
        ("stages.pretrain.model_overrides={patch_size: true}", "patch_size is True; it must be a number"),
        ("stages.pretrain.model_overrides={ffn: true}", "ffn is True; it must be 'mlp' or 'swiglu'"),
    ],
)
def test_booleans_are_no_numbers_of_lists_and_choices(override: str, expected: str) -> None:
    assert expected in said(ROOT / "conf" / "full_pipeline.yaml", override)


def test_a_mistake_inside_an_overridden_list_is_where_it_was_written() -> None:
    message = said(ROOT / "conf" / "full_pipeline.yaml", "elastic.workers=[0, 2]")
    assert "at   command line `elastic.workers=[0, 2]`  elastic.workers.0 = 0" in message


def test_booleans_are_booleans() -> None:
    switches = ["elastic.exact=false", "stages.distill.teacher_cache=true", "cluster.dashboard=true"]
    overrides = [*switches, "stages.pretrain.model_overrides={key_bias: true}"]
    loaded = load(ROOT / "conf" / "full_pipeline.yaml", overrides, needs_data=False)
    assert loaded.spec.cluster.dashboard is True


def test_every_number_of_the_schema_refuses_booleans() -> None:
    schema = Pipeline[AnyStage].__pydantic_core_schema__
    numbers = {path for path, _ in _numbers(schema, ())}
    refused = {(*path, "schema") for path in _refusing(schema, ())}
    assert numbers
    assert numbers == refused


def _refusing(schema: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Where a number is behind the check that refuses booleans."""
    if isinstance(schema, dict):
        if schema.get("type") == "function-before" and isinstance(schema["function"]["function"], _NoBoolean):
            if schema["schema"]["type"] != "literal":
                yield path
            return
        for name, inner in schema.items():
            if name not in _NOT_CHECKED:
                yield from _refusing(inner, (*path, name))
    elif isinstance(schema, (list, tuple)):
        for number, inner in enumerate(schema):
            yield from _refusing(inner, (*path, number))


def test_every_number_of_the_schema_has_bounds() -> None:
    unbounded = [
        path
        for path, schema in _numbers(Pipeline[AnyStage].__pydantic_core_schema__, ())
        if not _bounded(schema)
    ]
    assert not unbounded


# What is for the JSON Schema alone: the value is checked by what the validator is put before.
_NOT_CHECKED = ("metadata", "json_schema_input_schema")


def _numbers(schema: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float"):
            yield path, schema
        for name, inner in schema.items():
            if name not in _NOT_CHECKED:
                yield from _numbers(inner, (*path, name))
    elif isinstance(schema, (list, tuple)):
        for number, inner in enumerate(schema):
            yield from _numbers(inner, (*path, number))


def _bounded(schema: dict[str, Any]) -> bool:
    limits = [schema.get("le", schema.get("lt")), schema.get("ge", schema.get("gt"))]
    finite = schema["type"] == "int" or schema.get("allow_inf_nan") is False
    return finite and all(limit is not None and math.isfinite(limit) for limit in limits)


# --- YAML -----------------------------------------------------------------------------------------------------------


def _laughs(depth: int = 12) -> str:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines)


LARGE = {
    "aliases": (_laughs(), "more than 100,000 values"),
    "merged aliases": (_laughs().replace("[x, x", "[x, <<, x"), "more than 100,000 values"),
    "depth": ("name: " + "[" * 60_000, "nested deeper than 50 levels"),
    "block depth": ("\n".join(" " * i + "a:" for i in range(300)), "nested deeper"),
    "values": ("name: [" + "1," * 120_000 + "]", "more than 100,000 values"),
    "bytes": ("# " + "x" * (1 << 20), "larger than 1,048,576 bytes"),
    "digits": ("name: x\nseed: " + "9" * 6000, "a number of 6,000 digits"),
    "hexadecimal": ("name: x\nseed: 0x" + "f" * 6000, "a number of 6,002 digits"),
    "sexagesimal": ("name: x\nseed: 1" + ":59" * 3000, "a number of 9,001 digits"),
    "bad date": ("name: x\nseed: 2024-13-45", "a value cannot be read"),
    "binary": ("name: x\nseed: !!binary aGVsbG8=", "`!!binary` is not supported"),
    "python": ("name: !!python/object/apply:os.system [true]", "not valid YAML"),
    "surrogate": ('name: x\nstore: "\\uD800"', "a value cannot be read"),
    "list as a key": ("name: x\n? [a, b]\n: 3", "not valid YAML"),
    "contains itself": ("name: x\nstages: &a {b: *a}", "contains itself"),
    "control characters": ('name: x\n"\\e[31mred\\a": 3', "\\x1b[31mred\\x07"),
    "a long key": ("name: x\n" + "k" * 900 + ": 3", "unknown key"),
    "a NUL in a path": ('name: x\nstages: {}\ndata: {p: {path: "a\\0b"}}', "without NUL"),
    "a long path": ("name: x\nstages: {}\ndata: {p: {path: " + "a" * 300 + "}}", "names of at most 255"),
    "a long name": ("name: " + "x" * 300 + "\nstages: {}", "at most 100 characters"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy if name == "values" else ()) for name in LARGE]
)
def test_yaml_has_bounds_that_are_looked_at_before_anything_is_built(name: str, tmp_path: Path) -> None:
    text, expected = LARGE[name]
    path = tmp_path / "p.yaml"
    path.write_text(text)
    began = time.monotonic()
    message = said(path)
    assert time.monotonic() - began < 20, "it must not be built first"
    assert expected in message
    assert max(len(line) for line in message.splitlines()) < 1200
    assert all(line.isprintable() for line in message.splitlines())


@pytest.mark.parametrize("name", ["aliases", "depth", "digits", "bad date", "binary"])
def test_overrides_have_the_same_bounds(name: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: x\nstages: {}\n")
    text, expected = LARGE[name]
    assert expected in said(tmp_path / "p.yaml", f"x={text.removeprefix('name: x').strip()}")


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "more than 20 files extend each other" in said(tmp_path / "0.yaml")


def test_a_file_that_is_no_file_is_one_message(tmp_path: Path) -> None:
    assert "not a regular file" in said(Path("/dev/zero"))
    assert "cannot read" in said(tmp_path)
    assert "no such pipeline file" in said(tmp_path / "a\0b")


def test_there_is_an_end_to_messages(tmp_path: Path) -> None:
    stages = "\n".join(f"  s{number}: {{kind: curat}}" for number in range(500))
    (tmp_path / "p.yaml").write_text(f"name: x\nstages:\n{stages}\n")
    message = said(tmp_path / "p.yaml")
    assert message.count("unknown kind") == 20
    assert message.endswith("and 480 more mistakes")


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("init", ["kind", "needs"], None),
        ("lora", ["gram", "heads"], None),
        ("pretrian", ["pretrain"], "pretrain"),
        ("batchsize", ["batch_size"], "batch_size"),
        ("fotos", ["photos"], "photos"),
        ("k" * 100_000, ["kind"], None),
    ],
)
def test_near_words_are_near(word: str, known: list[str], near: str | None) -> None:
    assert nearest(word, known) == near


# --- anything -------------------------------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0, -(10**30)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from(["auto", "", ".", "..", "/", "\0", "\ud800", "x" * 5000, "s3://", "s3://b/p", "file://", "://",
                     "sqlite:///", "http://", "http://[", "a\nb", "~", "~nobody", "%", "{}", "2024-01-01", "é" * 200]),
    st.binary(max_size=4),
    st.dates(),
)  # fmt: skip
VALUES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | ODD, inner, max_size=4),
    max_leaves=8,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


PATHS = [path for path in _paths(FULL) if path]
# Keys that the file does not write, but may.
NAMES = sorted(
    {name for path in PATHS for name in path if isinstance(name, str)}
    | {"ema", "gram", "homogeneous", "captions", "resources", "labels", "runtime_env", "uri", "experiment", "address",
       "device", "compile", "views", "teachers", "tokenizer", "from", "templates", "image_size", "alias", "extends"}
)  # fmt: skip


def loads_or_refuses(path: Path, *overrides: str) -> None:
    try:
        load(path, overrides, needs_data=False).resolved()
    except UserError as error:
        message = str(error)
        assert message.strip()
        assert len(message) < 40_000
        message.encode()


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    path = tmp_path_factory.mktemp("odd") / "p.yaml"

    def write(text: str) -> Path:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        return path

    return write


@pytest.mark.heavy
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(PATHS), st.none() | st.sampled_from(NAMES), VALUES), min_size=1, max_size=3
    )
)
@example([(("store",), None, "file://\0")])
@example([(("stages", "pretrain", "steps"), None, 10**30)])
@example([(("data", "food", "path"), None, "x" * 5000)])
@example([(("tracking", "uri"), None, "http://[")])
def test_any_odd_value_anywhere_loads_or_is_a_user_error(
    write: Callable[[str], Path], changes: list[tuple[tuple[Any, ...], str | None, Any]]
) -> None:
    data = copy.deepcopy(FULL)
    for path, added, value in changes:
        inside: Any = data
        for part in path[:-1]:
            try:
                inside = inside[part]
            except (KeyError, IndexError, TypeError):
                break
        else:
            if added is not None and isinstance(inside, dict):
                inside[added] = value
            elif isinstance(inside, dict):
                inside[path[-1]] = value
    loads_or_refuses(write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)))


@pytest.mark.heavy
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10) | ODD, VALUES, max_size=5))
def test_any_mapping_loads_or_is_a_user_error(write: Callable[[str], Path], data: dict[Any, Any]) -> None:
    loads_or_refuses(write(yaml.safe_dump(data, allow_unicode=True)))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
@example("a: !!timestamp x")
@example("a: !!int x")
@example("a: !!float {}")
@example("<<: 3")
@example("a: &a\n  <<: *a")
@example("? {a: b}\n: c")
@example("%YAML 9.9\n---\na: b")
@example("a: 1\n---\nb: 2")
def test_any_text_loads_or_is_a_user_error(write: Callable[[str], Path], text: str) -> None:
    loads_or_refuses(write(text))


@pytest.mark.heavy
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PATHS), st.text(max_size=12) | VALUES.map(str))
def test_any_override_loads_or_is_a_user_error(path: tuple[Any, ...], text: str) -> None:
    loads_or_refuses(ROOT / "conf" / "full_pipeline.yaml", ".".join(map(str, path)) + "=" + text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.distill.students.vit-nano.zero_stage='3'", "must be 'auto', 0, 1, 2 or 3, not '3'"),
        ("stages.distill.students.vit-nano.zero_stage='true'", "not 'true'"),
        ("stages.distill.students.vit-nano.zero_stage='null'", "not 'null'"),
        ("stages.distill.students.vit-nano.zero_stage=three", "not three"),
    ],
)
def test_a_text_that_reads_like_a_number_is_in_quotes(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(_changed("name", "odd"))
    assert expected in said(path, override)


@pytest.mark.parametrize("value", ["null", "7", "[a]"])
def test_what_is_no_path_is_told_in_plain_words(tmp_path: Path, value: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(_changed("name", "odd"))
    message = said(path, "data={photos: {path: " + value + "}}")
    assert "must be a path" in message
    assert "pathlib" not in message
    assert "input" not in message.splitlines()[0]
