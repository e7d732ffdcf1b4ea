"""Pre-norm transformer block shared by the vision, text and alignment towers.

Every module reads only its own parameters in its own forward, so that ZeRO-3 can gather them around each
`__call__`; randomness (which rows a block drops) is drawn by the tower and passed in, so that recomputing a
block for activation checkpointing repeats it exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configs import FFN
from .rope import rotate

Rotation = tuple[Tensor, Tensor]


class QKV(nn.Module):
    """Fused projection to queries, keys and values, with biases on queries and values.

    A bias on keys is an extra: without rotary positions softmax cancels it, and with them it is a learnt preference
    for distances.
    """

    def __init__(self, dim: int, bias: bool, key_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.k_bias = nn.Parameter(torch.zeros(dim)) if key_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N, 3D)."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
            bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        return F.linear(x_BND, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention, optionally rotary, optionally causal."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, causal: bool = False, key_bias: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = QKV(dim, qkv_bias, key_bias)
        self.proj = linear(dim, dim)

    def forward(self, x_BND: Tensor, rope: Rotation | None = None) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        batch, num_tokens, dim = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        q_BHND, k_BHND, v_BHND = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q_BHND, k_BHND = rotate(q_BHND, *rope), rotate(k_BHND, *rope)
        out = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, is_causal=self.causal)
        mixed: Tensor = self.proj(out.transpose(1, 2).reshape(batch, num_tokens, dim))
        return mixed


class MLP(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (GLU variants, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class LayerScale(nn.Module):
    """A learnt factor a channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


Group = tuple[Tensor, Rotation | None, Tensor | None, Tensor | None]


class TransformerBlock(nn.Module):
    """x + scale(attention(norm(x))), then x + scale(ffn(norm(x))); each branch on a subset of rows if given.

    Args:
        layer_scale_init: None leaves the branches unscaled.

    Attributes:
        recompute: keep only the block's input for the backward pass and compute the rest again there.
    """

    recompute = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        ffn: FFN = "mlp",
        qkv_bias: bool = True,
        key_bias: bool = False,
        layer_scale_init: float | None = None,
        norm_eps: float = 1e-5,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, num_heads, qkv_bias, causal, key_bias)
        self.scale1 = _layer_scale(dim, layer_scale_init)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = MLP(dim, hidden) if ffn == "mlp" else SwiGLU(dim, hidden)
        self.scale2 = _layer_scale(dim, layer_scale_init)

    def forward(
        self,
        x_BND: Tensor,
        rope: Rotation | None = None,
        attention_rows: Tensor | None = None,
        ffn_rows: Tensor | None = None,
        *more: Group,
    ) -> Tensor | tuple[Tensor, ...]:
        """(B, N, D) → (B, N, D). `*_rows` int64: the rows that take the branch (see :func:`draw_rows`).

        With `more` groups of other sizes, (x, rope, attention_rows, ffn_rows) each, a tuple of all results: under
        ZeRO-3 one call fetches the block's weights once for global and local crops together.
        """
        first = self._group(x_BND, rope, attention_rows, ffn_rows)
        return (first, *(self._group(*group) for group in more)) if more else first

    def _group(
        self, x_BND: Tensor, rope: Rotation | None, attention_rows: Tensor | None, ffn_rows: Tensor | None
    ) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._compute(x_BND, rope, attention_rows, ffn_rows)
        out: Tensor = checkpoint(
            self._compute,
            x_BND,
            rope,
            attention_rows,
            ffn_rows,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return out

    def _compute(
        self, x_BND: Tensor, rope: Rotation | None, attention_rows: Tensor | None, ffn_rows: Tensor | None
    ) -> Tensor:
        x_BND = add_residual(x_BND, lambda x: self._attend(x, rope), attention_rows)
        return add_residual(x_BND, self._feed, ffn_rows)

    def _attend(self, x_BND: Tensor, rope: Rotation | None) -> Tensor:
        out_BND: Tensor = self.scale1(self.attention(self.norm1(x_BND), rope))
        return out_BND

    def _feed(self, x_BND: Tensor) -> Tensor:
        out_BND: Tensor = self.scale2(self.ffn(self.norm2(x_BND)))
        return out_BND


def _layer_scale(dim: int, init: float | None) -> nn.Module:
    return nn.Identity() if init is None else LayerScale(dim, init)


def linear(dim_in: int, dim_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer with weights from a truncated normal of std 0.02 and zero bias."""
    layer = nn.Linear(dim_in, dim_out, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def draw_rows(
    batch: int, drop_path: float, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """The rows of a batch that take a residual branch, or None for all: stochastic depth that saves compute.

    round((1 - drop_path) · batch) rows, at least one, uniformly without replacement (DINOv2, arXiv
    2304.07193, section 5). Drawn on the generator's device: a CPU generator gives the same rows on every
    accelerator. Without a generator nothing is dropped.
    """
    if generator is None:
        return None
    kept = max(1, round((1 - drop_path) * batch))
    if kept >= batch:
        return None
    return torch.randperm(batch, generator=generator, device=generator.device)[:kept].to(device)


def add_residual(x: Tensor, branch: Callable[[Tensor], Tensor], rows: Tensor | None) -> Tensor:
    """x + branch(x), or the branch on `rows` only, scaled by batch / rows so that its expectation is kept."""
    if rows is None:
        return x + branch(x)
    residual = branch(x.index_select(0, rows)) * (x.shape[0] / rows.shape[0])
    return x.index_add(0, rows, residual.to(x.dtype))
