"""The same weights under the names of other projects, as tables: a row a weight, a column a layout.

In a cell, `*` stands for weight and bias, `#` for the index of a block or stage, `a+b` for the rows of a and then
those of b, `0` for rows of zeros that nobody stores; `-` is a weight that the layout lacks, `name?` one that it lacks
when empty, `[name]` one that it keeps without our leading axis of length 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..configs import Config, ViTConfig

LAYOUTS = ("ours", "transformers", "timm", "hub")

_VIT = """
cls_token       embeddings.cls_token            cls_token           cls_token
storage_tokens  embeddings.register_tokens      reg_token?          storage_tokens?
mask_token      embeddings.mask_token           -                   [mask_token]
patch_embed.*   embeddings.patch_embeddings.*   patch_embed.proj.*  patch_embed.proj.*
norm.*          norm.*                          norm.*              norm.*
"""
_LOCAL_NORM = """
local_norm.*    -                               -                   local_cls_norm.*
"""
_VIT_BLOCK = "blocks.#.  model.layer.#.  blocks.#.  blocks.#."
_ATTENTION = """
norm1.*                norm1.*                                                      norm1.*          norm1.*
attention.qkv.weight   attention.q_proj.weight+attention.k_proj.weight+attention.v_proj.weight \
                                                                             attn.qkv.weight  attn.qkv.weight
attention.proj.*       attention.o_proj.*                                           attn.proj.*      attn.proj.*
scale1.gamma           layer_scale1.lambda1                                         gamma_1          ls1.gamma
norm2.*                norm2.*                                                      norm2.*          norm2.*
scale2.gamma           layer_scale2.lambda1                                         gamma_2          ls2.gamma
"""
_QKV_BIAS = """
attention.qkv.q_bias+0+attention.qkv.v_bias  attention.q_proj.bias+0+attention.v_proj.bias \
                                             attn.q_bias+0+attn.v_bias   attn.qkv.bias
"""
_KEY_BIAS = """
attention.qkv.q_bias+attention.qkv.k_bias+attention.qkv.v_bias \
              attention.q_proj.bias+attention.k_proj.bias+attention.v_proj.bias  attn.qkv.bias  attn.qkv.bias
"""
_MLP = """
ffn.up.*               mlp.up_proj.*          mlp.fc1.*        mlp.fc1.*
ffn.down.*             mlp.down_proj.*        mlp.fc2.*        mlp.fc2.*
"""
_SWIGLU = """
ffn.gate.*             mlp.gate_proj.*        mlp.fc1_g.*      mlp.w1.*
ffn.up.*               mlp.up_proj.*          mlp.fc1_x.*      mlp.w2.*
ffn.down.*             mlp.down_proj.*        mlp.fc2.*        mlp.w3.*
"""
_CONVNEXT = """
mask_token             -                                       -                        -
downsamples.0.0.*      model.stages.0.downsample_layers.0.*    stem.0.*                 downsample_layers.0.0.*
downsamples.0.1.*      model.stages.0.downsample_layers.1.*    stem.1.*                 downsample_layers.0.1.*
norm.*                 layer_norm.*                            head.norm.*              norm.*
"""
_DOWNSAMPLE = """
downsamples.#.0.*      model.stages.#.downsample_layers.0.*    stages.#.downsample.0.*  downsample_layers.#.0.*
downsamples.#.1.*      model.stages.#.downsample_layers.1.*    stages.#.downsample.1.*  downsample_layers.#.1.*
"""
_CONVNEXT_BLOCK = "stages.#.#.  model.stages.#.layers.#.  stages.#.blocks.#.  stages.#.#."
_CONVOLUTION = """
depthwise.*            depthwise_conv.*       conv_dw.*        dwconv.*
norm.*                 layer_norm.*           norm.*           norm.*
up.*                   pointwise_conv1.*      mlp.fc1.*        pwconv1.*
down.*                 pointwise_conv2.*      mlp.fc2.*        pwconv2.*
gamma                  gamma                  gamma            gamma
"""

# Older spellings of a layout.
_RESPELLED = {
    "transformers": ((r"^layer\.", "model.layer."), (r"^stages\.", "model.stages.")),
}
# What a file of the layout may also hold and a tower does not need: classifiers, and the hub's second name of the
# last norm. What is not named here must fit.
IGNORED = {
    "timm": r"head\.fc\.(weight|bias)",
    "hub": r"norms\.3\.(weight|bias)",
}


@dataclass(frozen=True)
class Row:
    """Rows of `ours`, one below the other, are the rows of `theirs`; "0" is a part of zeros, equally high."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    squeezed: bool = False
    left_out_empty: bool = False


def rows(config: Config, layout: str) -> list[Row]:
    """The table of a tower of `config`, all indices and weights and biases written out.

    A weight that the layout lacks has no `theirs`.
    """
    column = LAYOUTS.index(layout)
    return [row for cells in _cells(config) for row in _written_out(cells[0], cells[column])]


def respelled(name: str, layout: str) -> str:
    """A name that may be in an older spelling of the layout, in its present one."""
    for pattern, replacement in _RESPELLED.get(layout, ()):
        name = re.sub(pattern, replacement, name)
    return name


def block_pattern(family: str, layout: str) -> re.Pattern[str]:
    """What the names of a block's weights begin with in a layout; groups: its indices."""
    prefixes = _VIT_BLOCK if family == "vit" else _CONVNEXT_BLOCK
    return re.compile(re.escape(prefixes.split()[LAYOUTS.index(layout)]).replace(r"\#", r"(\d+)"))


def _cells(config: Config) -> Iterator[list[str]]:
    if isinstance(config, ViTConfig):
        yield from _table(_VIT + (_LOCAL_NORM if config.separate_local_norm else ""))
        ffn = _SWIGLU if config.ffn == "swiglu" else _MLP
        bias = _KEY_BIAS if config.key_bias else _QKV_BIAS if config.qkv_bias else ""
        block = _prefixed(_VIT_BLOCK, _ATTENTION + bias + ffn)
        for index in range(config.depth):
            yield from _numbered(block, index)
    else:
        yield from _table(_CONVNEXT)
        block = _prefixed(_CONVNEXT_BLOCK, _CONVOLUTION)
        for stage, depth in enumerate(config.depths):
            if stage:
                yield from _numbered(_table(_DOWNSAMPLE), stage)
            for index in range(depth):
                yield from _numbered(block, stage, index)


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line]


def _prefixed(prefixes: str, text: str) -> list[list[str]]:
    """Each name of each cell with its layout's prefix."""
    return [
        [
            "+".join(name if name == "0" else prefix + name for name in cell.split("+"))
            for prefix, cell in zip(prefixes.split(), cells, strict=True)
        ]
        for cells in _table(text)
    ]


def _numbered(table: list[list[str]], *indices: int) -> Iterator[list[str]]:
    """The table with the `#` of each name replaced by the indices, in order."""

    def number(name: str) -> str:
        for index in indices:
            name = name.replace("#", str(index), 1)
        return name

    for cells in table:
        yield ["+".join(map(number, cell.split("+"))) for cell in cells]


def _written_out(ours: str, theirs: str) -> Iterator[Row]:
    for kind in ("weight", "bias") if "*" in ours else ("",):
        our_names = tuple(ours.replace("*", kind).split("+"))
        cell = theirs.replace("*", kind)
        names = () if cell == "-" else tuple(cell.strip("[]?").split("+"))
        yield Row(our_names, names, squeezed=cell.startswith("["), left_out_empty=cell.endswith("?"))
