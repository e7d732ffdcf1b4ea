"""How `orchestrator checkpoint inspect` prints what it found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from orchestrator.table import stage_table
from orchestrator.training.checkpoint.inspect import Description
from orchestrator.units import size


def print_checkpoints(console: Console, descriptions: Sequence[Description]) -> bool:
    """One checkpoint in full, or a line for each of several; True if all of them can be used."""
    if len(descriptions) == 1:
        print_description(console, descriptions[0])
    else:
        table = stage_table("step", "updates", "skipped", "workers", "group", "written", "size", "state")
        for one in descriptions:
            counts = (f"{one.updates:,}", f"{one.skips.total:,}", str(one.workers))
            known = (*counts, one.token, one.created, size(one.size))
            table.add_row(_step(one), *(known if one.files else ("",) * len(known)), _state(one.problem))
        console.print(table)
    return all(one.problem is None for one in descriptions)


def print_description(console: Console, description: Description) -> None:
    """Everything about one checkpoint: where it comes from, what it holds, and its files one by one."""
    head = Text(f"Checkpoint {description.path}", style="bold")
    console.print(head, soft_wrap=True)
    console.print(_state(description.problem), soft_wrap=True)
    if not description.files:
        return
    facts = {
        "step": _step(description),
        "updates": f"{description.updates:,}",
        "skipped": f"{description.skips.total:,}",
        "workers": f"{description.workers} (group {description.token})",
        "written": description.created,
        **{name: str(value) for name, value in description.meta.items()},
        "with": ", ".join(f"{name} {version}" for name, version in description.versions.items()),
    }
    table = stage_table("", "")
    table.show_header = False
    for name, value in facts.items():
        table.add_row(Text(name, style="bright_black"), value)
    console.print(table)
    console.print()
    if description.skips.recent:
        console.print(Text(f"skipped updates\n  {description.skips.listed()}\n"), soft_wrap=True)
    holds = stage_table("holds", "tensors", "elements")
    for kind in description.kinds:
        holds.add_row(kind.name, f"{kind.tensors:,}", f"{kind.elements:,}")
    console.print(holds)
    console.print()
    files = stage_table("file", "size", "state")
    for file in description.files:
        files.add_row(file.name, size(file.size), _state(file.problem))
    console.print(files)
    console.print(Text(f"{size(description.size)} in {len(description.files)} files"), soft_wrap=True)


def _step(description: Description) -> str:
    return "?" if description.step is None else f"{description.step:,}"


def _state(problem: str | None) -> Text:
    return Text("✓ good", style="green") if problem is None else Text(f"✗ {problem}", style="red")
