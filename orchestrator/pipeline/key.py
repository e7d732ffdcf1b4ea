"""Content keys: what decides a stage's result, as a hash and as a record that explains a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from orchestrator.pipeline.code import code_version
from orchestrator.pipeline.yamlfile import show
from orchestrator.spec import Strict
from orchestrator.stages.base import Stage

# Part of every key: raise it when the layout of artifacts changes so that old ones cannot be read.
FORMAT = 1

_ABSENT = object()


class KeyParts(Strict):
    """Everything that decides a stage's result, and nothing that does not.

    Attributes:
        kind: the stage's kind.
        config: its fields that are not operational, without `kind` and `needs`.
        inputs: keys of the artifacts it reads, by role.
        data: fingerprints of the data sources it reads, by name.
        code: version of the code behind the stage.
        seed: the pipeline's seed.
        format: layout version of artifacts.
    """

    kind: str
    config: dict[str, Any]
    inputs: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    code: str = ""
    seed: int = 0
    format: int = FORMAT

    @property
    def key(self) -> str:
        """The content key, 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=True)
        return hashlib.sha256(text.encode()).hexdigest()


def key_parts(stage: Stage, *, inputs: Mapping[str, str], data: Mapping[str, str], seed: int) -> KeyParts:
    """The parts of `stage`'s key.

    Args:
        stage: the stage's config.
        inputs: keys of its input artifacts by role.
        data: fingerprints of the data sources it reads.
        seed: the pipeline's seed.
    """
    config = {name: value for name, value in stage.identity().items() if name not in ("kind", "needs")}
    return KeyParts(
        kind=stage.kind,
        config=json.loads(json.dumps(config)),
        inputs=dict(inputs),
        data=dict(data),
        code=code_version(type(stage).__module__),
        seed=seed,
    )


def diff(old: KeyParts, new: KeyParts) -> list[str]:
    """What changed between two keys, a line each: `config.lr: 0.001 → 0.002`."""
    lines = []
    if old.kind != new.kind:
        lines.append(f"kind: {old.kind} → {new.kind}")
    lines += _changes("config.", _flat(old.config), _flat(new.config), show)
    lines += _changes("input ", old.inputs, new.inputs, short)
    lines += _changes("data ", old.data, new.data, short)
    if old.code != new.code:
        lines.append(f"code: {short(old.code)} → {short(new.code)}")
    if old.seed != new.seed:
        lines.append(f"seed: {old.seed} → {new.seed}")
    if old.format != new.format:
        lines.append(f"artifact format: {old.format} → {new.format}")
    return lines


def short(key: str) -> str:
    """The first digits of a hash, enough to tell two apart by eye."""
    return key[:8]


def _changes(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any], text: Any) -> list[str]:
    lines = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != after:
            shown = [("(absent)" if value is _ABSENT else text(value)) for value in (before, after)]
            lines.append(f"{prefix}{name}: {shown[0]} → {shown[1]}")
    return lines


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names; lists stay whole."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat
