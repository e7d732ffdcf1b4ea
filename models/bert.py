"""Bidirectional post-norm text encoder (BERT, arXiv 1810.04805), to start a text tower from a trained one.

Sentence encoders such as MiniLM (arXiv 2002.10957) are of this kind: a text is the mean of its tokens (SBERT,
arXiv 1908.10084). Dropout is left out, so that a text has one embedding in training too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .bert_config import BERT_CONFIG, BERT_WEIGHTS, BertConfig, read_bert_config
from .blocks import MLP, QKV, linear


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + MLP(x))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        # Keys have no bias, here as elsewhere: softmax cancels it, BERT's too.
        self.qkv = QKV(config.dim, bias=True)
        self.proj = linear(config.dim, config.dim)
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn = MLP(config.dim, config.hidden)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, x_BLD: Tensor, mask_B11L: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D); `mask_B11L` is true where there is a token to look at."""
        batch, length, dim = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=mask_B11L)
        x_BLD = self.norm1(x_BLD + self.proj(mixed_BHLD.transpose(1, 2).reshape(batch, length, dim)))
        out_BLD: Tensor = self.norm2(x_BLD + self.ffn(x_BLD))
        return out_BLD


class BertEncoder(nn.Module):
    """Token and position embeddings, post-norm blocks, and the mean over a text's tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.token_embed = nn.Embedding(config.vocab_size, config.dim)
        self.position_embed = nn.Embedding(config.context, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.depth))
        for embedding in (self.token_embed, self.position_embed):
            nn.init.trunc_normal_(embedding.weight, std=0.02)

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Embeds texts.

        Args:
            tokens_BL: int64 (B, L), L at most the context. What follows a text's length is never seen.
            lengths_B: int64 (B,), number of tokens of each; None: all L.

        Returns:
            (B, dim), not normalised.

        Raises:
            ValueError: the texts are longer than the context.
        """
        length = tokens_BL.shape[1]
        if length > self.config.context:
            raise ValueError(f"texts of {length} tokens; the encoder's context is {self.config.context}")
        places_L = torch.arange(length, device=tokens_BL.device)
        if lengths_B is None:
            lengths_B = torch.full_like(tokens_BL[:, 0], length)
        is_token_BL = places_L < lengths_B[:, None]
        x_BLD = self.norm(self.token_embed(tokens_BL) + self.position_embed(places_L))
        for block in self.blocks:
            x_BLD = block(x_BLD, is_token_BL[:, None, None])
        pooled_BD: Tensor = (x_BLD * is_token_BL[..., None]).sum(1) / lengths_B[:, None].to(x_BLD.dtype)
        return pooled_BD


class Projection(nn.Module):
    """A bias-free linear map of text features into the common space with photos."""

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        self.proj = linear(dim, output_dim, bias=False)

    def forward(self, texts_BD: Tensor) -> Tensor:
        """(B, dim) → (B, output_dim), not normalised."""
        out_BE: Tensor = self.proj(texts_BD)
        return out_BE


class BertTower(Projection):
    """A :class:`BertEncoder` and a projection; as a text tower it is called like `TextTower`."""

    def __init__(self, encoder: BertEncoder, output_dim: int) -> None:
        super().__init__(encoder.dim, output_dim)
        self.encoder = encoder

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Embeds texts, (B, output_dim), not normalised; see :meth:`BertEncoder.forward`."""
        return super().forward(self.encoder(tokens_BL, lengths_B))


def load_bert(folder: str | Path) -> BertEncoder:
    """The encoder of a folder with config.json and model.safetensors, on the CPU, in float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: as :func:`read_bert_config`, or weights that do not fit the config.
    """
    config = read_bert_config(folder)
    state = _ours(load_file(Path(folder) / BERT_WEIGHTS), config.depth)
    with torch.device("meta"):
        encoder = BertEncoder(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if wrong:
        listed = ", ".join(f"{name} is {got.get(name)}, not {wanted.get(name)}" for name in wrong[:3])
        raise ValueError(f"{len(wrong)} weights in {folder} do not fit its {BERT_CONFIG}: {listed}")
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(True)


_NAMES = {
    r"embeddings\.word_embeddings\.weight": "token_embed.weight",
    r"embeddings\.position_embeddings\.weight": "position_embed.weight",
    r"embeddings\.LayerNorm\.(weight|bias)": r"norm.\1",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)": r"blocks.\1.proj.\2",
    r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"encoder\.layer\.(\d+)\.attention\.self\.query\.bias": r"blocks.\1.qkv.q_bias",
    r"encoder\.layer\.(\d+)\.attention\.self\.value\.bias": r"blocks.\1.qkv.v_bias",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)": r"blocks.\1.ffn.up.\2",
    r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)": r"blocks.\1.ffn.down.\2",
    r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(weight|bias)": r"blocks.\1.norm2.\2",
}
# The pooler is BERT's own head; key biases change nothing; what remains is folded in below.
_DROPPED = re.compile(r"pooler\..*|cls\..*|embeddings\.(position_ids|token_type_ids)|.*\.self\.key\.bias")
_FOLDED = re.compile(r"embeddings\.token_type_embeddings\.weight|.*\.self\.(query|key|value)\.weight")


def _ours(theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights by our names, float32; a name that is not known stays, for the error."""
    theirs = {name.removeprefix("bert."): weight.float() for name, weight in theirs.items()}
    ours: dict[str, Tensor] = {}
    for name, weight in theirs.items():
        if _DROPPED.fullmatch(name) or _FOLDED.fullmatch(name):
            continue
        known = (re.sub(old, new, name) for old, new in _NAMES.items() if re.fullmatch(old, name))
        ours[next(known, name)] = weight
    kinds = theirs.get("embeddings.token_type_embeddings.weight")
    if kinds is not None and "position_embed.weight" in ours:
        # All of a text is of the first kind (the second is for pairs of texts).
        ours["position_embed.weight"] = ours["position_embed.weight"] + kinds[0]
    for layer in range(depth):
        names = [f"encoder.layer.{layer}.attention.self.{part}.weight" for part in ("query", "key", "value")]
        if all(name in theirs for name in names):
            ours[f"blocks.{layer}.qkv.weight"] = torch.cat([theirs[name] for name in names])
    return ours
