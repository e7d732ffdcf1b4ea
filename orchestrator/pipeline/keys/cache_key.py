"""Content keys: what decides a stage's result, as a hash and as a record that explains a change.

No hash of code is in a key: see docs/adr/0007-keys.md. Who changes what a kind computes raises its `version`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from orchestrator.config.extension import versions
from orchestrator.config.settings import Strict
from orchestrator.config.yaml_source import show
from orchestrator.stages.base import Stage

# Part of every key. It says how keys are made and how artifacts are laid out: with another number, none that is there
# is found.
FORMAT = 2

_ABSENT = object()


class KeyParts(Strict):
    """Everything that decides a stage's result, and nothing that does not.

    Attributes:
        kind: the stage's kind.
        version: of the results of that kind, see `Stage.version`.
        config: its fields that are not operational, without `kind` and `needs`; as `extensions` the versions of what
            users' packages bring to it, if there are some.
        inputs: keys of the artifacts it reads, by role.
        data: fingerprints of the datasets it reads, by name.
        seed: the pipeline's seed.
        format: how keys and artifacts are made; records without it are of the first.
    """

    kind: str
    version: int = 1
    config: dict[str, Any]
    inputs: dict[str, str] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    seed: int = 0
    format: int = 1

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_formats(cls, values: Any) -> Any:
        """Parts in ledgers of earlier versions can be read and explained; none has the key of a stage of today."""
        if not isinstance(values, Mapping) or "code" not in values:
            return values
        return {name: value for name, value in values.items() if name != "code"}

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
        data: fingerprints of the datasets it reads.
        seed: the pipeline's seed.
    """
    config = {name: value for name, value in stage.identity().items() if name not in ("kind", "needs")}
    if brought := versions(stage):
        config["extensions"] = brought
    return KeyParts(
        kind=stage.kind,
        version=stage.version,
        config=json.loads(json.dumps(config)),
        inputs=dict(inputs),
        data=dict(data),
        seed=seed,
        format=FORMAT,
    )


def piece_parts(stage: Stage, parts: KeyParts, kind: str, identity: Mapping[str, Any]) -> KeyParts:
    """The parts of the key of a piece of a stage's result: its version and what it reads are the stage's.

    Args:
        stage: the stage's config.
        parts: of the stage's key.
        kind: of the piece.
        identity: see `Context.part`.
    """
    data = {field: digest for field, digest in parts.data.items() if stage.concerns(field, identity)}
    return parts.model_copy(update={"kind": kind, "config": json.loads(json.dumps(identity)), "data": data})


def diff(old: KeyParts, new: KeyParts) -> list[str]:
    """What changed between two keys, a line each: `config.lr: 0.001 → 0.002`."""
    lines = []
    if old.format != new.format:
        lines.append(f"an upgrade changed the format of keys: {old.format} → {new.format}")
    if old.kind != new.kind:
        lines.append(f"kind: {old.kind} → {new.kind}")
    if old.version != new.version:
        lines.append(f"version of {new.kind}'s results: {old.version} → {new.version}")
    lines += _changes("config.", _flat(old.config), _flat(new.config), show)
    lines += _changes("input ", old.inputs, new.inputs, short)
    lines += _changes("data ", old.data, new.data, short)
    if old.seed != new.seed:
        lines.append(f"seed: {old.seed} → {new.seed}")
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
