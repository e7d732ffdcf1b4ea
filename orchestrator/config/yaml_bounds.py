"""The YAML that is read: safe, within bounds of size and depth, and no number that YAML 1.1 reads as another one."""

from __future__ import annotations

import re
from typing import Any

import yaml

from orchestrator.config.private_values import is_private_text
from orchestrator.errors import UserError, shortened

# A pipeline file of hundreds of stages stays far below these; what is above would cost memory, or the stack.
MAX_DEPTH = 50
_MAX_NODES = 100_000
# Digits that a number may have; 10³⁰ is read, and refused by its field.
_MAX_NUMBER = 50
# As YAML 1.1 has them: 010 is 8, and 1:30 is 90.
_OCTAL = re.compile(r"[+-]?0[0-7_]*[1-9][0-7_]*")
_SIXTIES = re.compile(r"[+-]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")


class Loader(yaml.SafeLoader):
    """Safe, and with the booleans of YAML 1.2: `on` and `off`, a key and a value of pipeline files, are texts."""


_BOOL = "tag:yaml.org,2002:bool"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def check_size(text: str, where: str) -> None:
    """See that YAML stays within bounds once its aliases are written out; nothing is built for it.

    Raises:
        UserError: too many values, too deep a nesting, or a number of too many digits, with its line.
        yaml.YAMLError: it is not YAML.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    hides = is_private_text(text) or is_private_text(where)
    for event in yaml.parse(text, Loader):
        mark = event.start_mark
        here = f"{where}:{mark.line + 1}" if mark else where
        if isinstance(event, yaml.AliasEvent):
            # An alias of a node that is still open contains itself: the next reading says so.
            total += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
            _check_number(event, here, hides=hides)
        elif isinstance(event, yaml.CollectionStartEvent):
            total += 1
            open_nodes.append((event.anchor, total))
            if len(open_nodes) > MAX_DEPTH:
                raise UserError(f"nested deeper than {MAX_DEPTH} levels", where=here)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before + 1
        if total > _MAX_NODES:
            raise UserError(
                f"more than {_MAX_NODES:,} values, counting those of an alias each time it is used",
                where=here,
            )


def _check_number(event: yaml.ScalarEvent, where: str, *, hides: bool) -> None:
    """Python takes long to read a number of many digits, or does not; and YAML 1.1 reads some as another number.

    Args:
        hides: no number is shown, since each may be a secret.
    """
    text = event.value
    if event.style is not None or text[:1] not in "+-0123456789":
        return
    # The length is looked at first: the patterns take long on long texts.
    is_long = len(text) > _MAX_NUMBER
    if not (is_long or _OCTAL.fullmatch(text) or _SIXTIES.fullmatch(text)):
        return
    loader: Any = Loader("")
    kind = loader.resolve(yaml.ScalarNode, text, (True, False))
    if kind not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return
    number = None if is_long else loader.construct_object(yaml.ScalarNode(kind, text))
    if not is_long and ":" not in text and number == int(text.replace("_", "")):
        return  # 007 is 7 either way
    if hides:
        what, hint = "a number is too long, or YAML takes it for another one", "put it in quotes"
    elif is_long:
        what, hint = f"a number of {len(text):,} digits: {shortened(text, 40)}", "put it in quotes"
    else:
        what = f"YAML takes {text} for the number {number}"
        without_zeros = re.sub(r"^([+-]?)[0_]+", r"\1", text)
        hint = f"write {number if ':' in text else f'{without_zeros} or {number}'}, or put it in quotes"
    raise UserError(what, where=where, hint=f"{hint} if it is a text")
