"""The table of presets: parameters and cost of a forward, without building anything."""

from __future__ import annotations

from typing import TypedDict

from rich.console import Console
from rich.table import Table

from orchestrator.models.configs import Config, ViTConfig
from orchestrator.models.cost import forward_flops, num_params
from orchestrator.models.presets import all_presets

_SIZES = (256, 512)


class ModelRow(TypedDict):
    """One preset. `gflops_*`: 10⁹ operations (2 a multiply-add) of one square image's forward."""

    name: str
    params: int
    gflops_256: float
    gflops_512: float


def model_rows() -> list[ModelRow]:
    """All presets, the published family first, those of installed packages last."""
    rows = []
    for name, config in all_presets().items():
        small, large = (forward_flops(config, size, size) / 1e9 for size in _SIZES)
        rows.append(ModelRow(name=name, params=num_params(config), gflops_256=small, gflops_512=large))
    return rows


def print_models(console: Console) -> None:
    """The presets as a table for people."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    for column in ("patch", "width", "blocks", "parameters", "GFLOPs at 256 px", "at 512 px"):
        table.add_column(column, justify="right")
    known = all_presets()
    for row in model_rows():
        shape = map(str, _shape(known[row["name"]]))
        figures = (f"{row['params']:,}", f"{row['gflops_256']:,.2f}", f"{row['gflops_512']:,.2f}")
        table.add_row(row["name"], *shape, *figures)
    console.print(table)
    console.print("[bright_black]Forward of one image; a multiply-add counts as 2 operations.[/]")


def _shape(config: Config) -> tuple[int, int, int]:
    """Patch, width of the features, number of blocks."""
    if isinstance(config, ViTConfig):
        return config.patch_size, config.dim, config.depth
    return config.patch_size, config.dims[-1], sum(config.depths)
