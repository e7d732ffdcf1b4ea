"""Two ways to trade compute, memory and start-up time in a tower, none of which changes what it computes."""

from __future__ import annotations

import torch
from torch import nn

from .blocks import TransformerBlock
from .convnext import ConvNeXtBlock


def recompute_blocks(model: nn.Module) -> None:
    """Keep only the inputs of blocks for the backward pass (Chen et al., arXiv 1604.06174).

    Rows that a block drops and its rotation are drawn by the tower and passed in, so the second time is like the first.
    """
    for block in model.modules():
        if isinstance(block, (TransformerBlock, ConvNeXtBlock)):
            block.recompute = True


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile what is inside each block: all blocks of a tower share one graph for each shape of crop.

    Only the inside: ZeRO-3's hooks, which fetch a block's weights around its call, stay outside of the graph.
    """
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            block._compute = torch.compile(block._compute, backend=backend)  # type: ignore[method-assign]
        elif isinstance(block, ConvNeXtBlock):
            block._branch = torch.compile(block._branch, backend=backend)  # type: ignore[method-assign]
