"""What changes a key and what does not, and how a change is explained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toys

from orchestrator.pipeline.keys import code_digest
from orchestrator.pipeline.keys.cache_key import KeyParts, diff
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import ResolvedStage, resolve


def keys(path: Path, *overrides: str, data: str = "same") -> dict[str, str]:
    return {name: stage.key for name, stage in stages(path, *overrides, data=data).items()}


def stages(path: Path, *overrides: str, data: str = "same") -> dict[str, ResolvedStage]:
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    return {stage.name: stage for stage in resolve(loaded, lambda source, name: data)}


@pytest.mark.parametrize(
    "override",
    [
        "elastic.workers=1",
        "elastic.checkpoint_every_s=5",
        "stages.pretrain.elastic.workers=3",
        "stages.pretrain.checkpoint_every=9",
        "store=elsewhere/",
        "tracking.experiment=other",
        "cluster.address=auto",
        "name=other",
    ],
)
def test_how_a_stage_runs_is_not_in_its_key(pipeline: Path, override: str) -> None:
    assert keys(pipeline, override) == keys(pipeline)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.curate.ticks=5", {"curate", "pretrain", "evaluate"}),
        ("stages.pretrain.optim.lr=0.3", {"pretrain", "evaluate"}),
        ("stages.evaluate.ticks=5", {"evaluate"}),
        ("seed=1", {"curate", "pretrain", "evaluate"}),
    ],
)
def test_a_change_reaches_what_depends_on_it_and_no_more(
    pipeline: Path, override: str, changed: set[str]
) -> None:
    before, after = keys(pipeline), keys(pipeline, override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_layout_comments_defaults_and_names_of_stages_are_not_in_a_key(pipeline: Path) -> None:
    before = keys(pipeline)
    text = (
        pipeline.read_text()
        .replace("pretrain:\n", "train:  # what a name\n")
        .replace("[pretrain,", "[ train,")
    )
    pipeline.write_text(text.replace("{lr: 0.2}", "{betas: [0.9, 0.95], lr: 2.0e-1}"))
    after = keys(pipeline)
    assert (after["train"], after["evaluate"]) == (before["pretrain"], before["evaluate"])


def test_the_content_of_a_data_source_is_in_the_key_of_what_reads_it(pipeline: Path) -> None:
    assert keys(pipeline, data="one")["curate"] != keys(pipeline, data="two")["curate"]


def test_a_change_is_explained_by_name(pipeline: Path) -> None:
    before = stages(pipeline, data="1111111111")
    after = stages(
        pipeline, "stages.pretrain.optim.lr=0.3", "stages.curate.ticks=2", "seed=4", data="2222222222"
    )
    assert diff(before["curate"].parts, after["curate"].parts) == [
        "config.ticks: 1 → 2",
        "data photos: 11111111 → 22222222",
        "seed: 0 → 4",
    ]
    index = f"input index: {before['curate'].key[:8]} → {after['curate'].key[:8]}"
    assert diff(before["pretrain"].parts, after["pretrain"].parts) == [
        "config.optim.lr: 0.2 → 0.3",
        index,
        "seed: 0 → 4",
    ]


def test_fields_that_come_and_go_are_explained() -> None:
    old = KeyParts(kind="a", config={"x": 1, "y": {"z": [1]}})
    new = KeyParts(kind="a", version=2, config={"x": None, "w": True}, inputs={"index": "f" * 64})
    assert diff(old, new) == [
        "version of a's results: 1 → 2",
        "config.x: 1 → (empty)",
        "config.y.z: [1] → (absent)",
        "config.w: (absent) → true",
        "input index: (absent) → ffffffff",
    ]


def test_parts_of_an_earlier_format_are_read_explained_and_never_taken_for_todays(pipeline: Path) -> None:
    """They had a hash of the package's code, and no number of their format."""
    for stage in stages(pipeline).values():
        record = stage.parts.model_dump(mode="json") | {"code": "0123456789abcdef"}
        old = KeyParts.model_validate(
            {name: record[name] for name in record if name not in ("format", "version")}
        )
        assert old.key != stage.key
        assert diff(old, stage.parts) == ["an upgrade changed the format of keys: 1 → 2"]


def test_a_kinds_version_is_in_its_key_and_reaches_what_depends_on_it(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(pipeline)
    monkeypatch.setattr(toys.Pretrain, "version", 2)
    after = keys(pipeline)
    assert {name for name in before if before[name] != after[name]} == {"pretrain", "evaluate"}


def test_code_is_in_no_key(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(pipeline)
    monkeypatch.setattr(code_digest, "code_of", lambda module: {"training/loop.py": "0" * 16})
    assert keys(pipeline) == before


def test_parts_survive_the_ledger_with_the_same_key(pipeline: Path) -> None:
    for stage in stages(pipeline, "stages.pretrain.optim.lr=1.0e-7").values():
        assert KeyParts.model_validate_json(stage.parts.model_dump_json()).key == stage.key


SOURCE = '''
"""A module."""
import math
from orchestrator.config.settings import Strict

class A(Strict):
    """A class."""
    x: int = 1  # a field
    y: int = Field(1, description="what it is")

    def f(self):
        "A method."
        from orchestrator.errors import UserError
        return math.pi
'''


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Code version of a module with the given source."""

    def version(source: str) -> str:
        path = tmp_path / "somestage.py"
        path.write_text(source)
        module = type(sys)("somestage")
        module.__file__ = str(path)
        monkeypatch.setitem(sys.modules, "somestage", module)
        code_digest._file_of.cache_clear()
        code_digest._parsed.cache_clear()
        return code_digest.digest_of(code_digest.code_of("somestage"))

    yield version
    code_digest._file_of.cache_clear()
    code_digest._parsed.cache_clear()


def test_comments_docstrings_descriptions_and_layout_do_not_change_the_code_version(versions) -> None:  # type: ignore[no-untyped-def]
    before = versions(SOURCE)
    changed = (
        SOURCE.replace("A class.", "Another.").replace("# a field", "").replace('"A method."', '"""Other."""')
    ).replace("what it is", "what it may be")
    assert versions(changed.replace("x: int = 1", "x: int = (\n        1)")) == before
    assert versions(SOURCE.replace("= 1", "= 2")) != before
    assert versions(SOURCE.replace("= 1", "= 1 * 1")) != versions(SOURCE.replace("= 1", "= 1 + 1")), (
        "operators"
    )
    assert versions(SOURCE.replace("math.pi", "math.e")) != before
    assert versions(SOURCE.replace("x: int", "z: int")) != before


def test_files_are_named_by_their_place_and_compared_one_by_one() -> None:
    found = code_digest.code_of("orchestrator.stages.ssl.pretrain")
    assert {
        "stages/ssl/pretrain.py",
        "training/loop.py",
        "config/settings.py",
        "models/__init__.py",
    } <= found.keys()
    other = {name: value for name, value in found.items() if name != "config/settings.py"} | {
        "training/loop.py": "0" * 16, "gone.py": "1" * 16,
    }  # fmt: skip
    assert code_digest.changes(found, other) == ["config/settings.py", "gone.py", "training/loop.py"]
    assert code_digest.changes(found, found) == []


def test_a_stage_is_tied_to_what_it_imports_and_not_to_other_stages() -> None:
    closure = code_digest._closure("orchestrator.stages.ssl.pretrain")
    assert "orchestrator.stages.ssl.pretrain" in closure
    assert "orchestrator.config.settings" in closure
    assert "orchestrator.stages" not in closure, (
        "the union of all stages would tie every stage to every other"
    )
    assert not [
        name for name in closure if name.startswith(("orchestrator.tracking", "orchestrator.storage"))
    ]
    assert [name for name in closure if name.startswith("orchestrator.elastic.")], (
        "imports inside functions count"
    )
