"""Shape of a trained text encoder, read from its folder. No torch: `orchestrator plan` checks it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

BERT_CONFIG, BERT_WEIGHTS, BERT_TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"

_ONLY = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_FIELDS = {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "norm_eps": "layer_norm_eps",
}


@dataclass(frozen=True)
class BertConfig:
    """Shape of an encoder; `context` is the longest text it can take, in tokens."""

    vocab_size: int
    context: int
    dim: int
    depth: int
    num_heads: int
    hidden: int
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads ({self.num_heads})")


def read_bert_config(folder: str | Path) -> BertConfig:
    """The shape that a folder's config.json, in the layout of transformers' `BertModel`, describes.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it describes something else, or a variant that is not supported.
    """
    path = Path(folder) / BERT_CONFIG
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, value in _ONLY.items():
        if record.get(name, value) != value:
            raise ValueError(f"{path} has {name} {record[name]!r}; only {value!r} can be read")
    if missing := sorted(set(_FIELDS.values()) - record.keys()):
        raise ValueError(f"{path} does not describe a BERT encoder: it has no {', '.join(missing)}")
    return BertConfig(**{ours: record[theirs] for ours, theirs in _FIELDS.items()})
