"""Reading ONNX files that protobuf's own library wrote, and taking a DINOv2 out of one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.parity import mend_torchvision  # noqa: E402
from orchestrator.data import dinov2_focus, weights  # noqa: E402
from orchestrator.data.onnx_file import read_onnx  # noqa: E402
from orchestrator.storage.cache_folder import cache_folder  # noqa: E402

# Of onnx.proto what a file of weights has: message → field → (number, type or message, repeated).
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Model": {"ir_version": (1, "INT64", False), "producer": (2, "STRING", False), "graph": (7, "Graph", False)},
    "Graph": {"node": (1, "Node", True), "name": (2, "STRING", False), "initializer": (5, "Tensor", True)},
    "Node": {
        "input": (1, "STRING", True),
        "output": (2, "STRING", True),
        "name": (3, "STRING", False),
        "op_type": (4, "STRING", False),
        "attribute": (5, "Attribute", True),
    },
    "Attribute": {"name": (1, "STRING", False), "f": (2, "FLOAT", False), "t": (5, "Tensor", False)},
    "Tensor": {
        "dims": (1, "INT64", True),
        "data_type": (2, "INT32", False),
        "float_data": (4, "FLOAT", True),
        "int64_data": (7, "INT64", True),
        "name": (8, "STRING", False),
        "raw_data": (9, "BYTES", False),
        "double_data": (10, "DOUBLE", True),
        "data_location": (14, "INT32", False),
    },
}  # fmt: skip


def messages(syntax: str) -> dict[str, Any]:
    """Classes of these messages; lists of numbers are packed in proto3, and not in proto2, which ONNX is."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{syntax}.proto", package=f"small_{syntax}", syntax=syntax
    )
    types = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            added = message.field.add(name=field, number=number)
            added.label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            if kind in _FIELDS:
                added.type, added.type_name = types.TYPE_MESSAGE, f".small_{syntax}.{kind}"
            else:
                added.type = getattr(types, f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"small_{syntax}.{name}"))
        for name in _FIELDS
    }


PROTO = messages("proto2")


def raw(name: str, values: NDArray[np.float32], proto: dict[str, Any] = PROTO) -> Any:
    return proto["Tensor"](name=name, dims=values.shape, data_type=1, raw_data=values.astype("<f4").tobytes())


def model(path: Path, nodes: Sequence[Any], tensors: Sequence[Any], proto: dict[str, Any] = PROTO) -> Path:
    graph = proto["Graph"](name="net", node=nodes, initializer=tensors)
    path.write_bytes(proto["Model"](ir_version=8, producer="test", graph=graph).SerializeToString())
    return path


@pytest.fixture
def values() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)


@pytest.mark.parametrize("syntax", ["proto2", "proto3"])
def test_tensors_and_what_reads_them(tmp_path: Path, values: NDArray[np.float32], syntax: str) -> None:
    proto = messages(syntax)
    tensor = proto["Tensor"]
    constant = proto["Attribute"](name="value", t=raw("", values[:1], proto))
    path = model(
        tmp_path / "net.onnx",
        [
            proto["Node"](name="/a/MatMul", op_type="MatMul", input=["x", "m", "ids"], output=["y"]),
            proto["Node"](name="/c", op_type="Constant", output=["made"], attribute=[constant]),
            proto["Node"](name="/a/Add", op_type="Add", input=["y", "made"], output=["z"]),
        ],
        [
            raw("m", values, proto),
            tensor(name="in numbers", dims=[3], data_type=1, float_data=[0.5, -2.0, 3e-9]),
            tensor(name="scalar", data_type=1, float_data=[7.0]),
            tensor(name="ids", dims=[2], data_type=7, int64_data=[1, -5]),
            tensor(name="double", dims=[1], data_type=11, double_data=[1.0]),
            tensor(name="elsewhere", dims=[9], data_type=1, data_location=1),
        ],
        proto,
    )
    found = read_onnx(path)
    assert found.tensors.keys() == {"m", "in numbers", "scalar", "made"}
    np.testing.assert_array_equal(found.tensors["m"], values)
    np.testing.assert_array_equal(found.tensors["in numbers"], np.array([0.5, -2.0, 3e-9], np.float32))
    assert found.tensors["scalar"].shape == ()
    assert found.reads["/a/MatMul"] == ("x", "m", "ids")
    np.testing.assert_array_equal(found.operand("/a/MatMul", (2, 300)), values)
    np.testing.assert_array_equal(found.operand("/a/Add", (1, 300)), values[:1])
    with pytest.raises(ValueError, match=r"reads 0 tensors of shape \(300, 2\); it has \(2, 300\)"):
        found.operand("/a/MatMul", (300, 2))
    with pytest.raises(ValueError, match="there is no operation /b"):
        found.operand("/b", (1,))


def test_what_is_no_whole_model_is_told(tmp_path: Path, values: NDArray[np.float32]) -> None:
    path = model(
        tmp_path / "net.onnx", [PROTO["Node"](name="/a", op_type="Add", input=["m"])], [raw("m", values)]
    )
    whole = path.read_bytes()
    # Each end within the graph is found: the first bytes, before it, are a model without one.
    for end in (0, 1, 5, 12, 14, 20, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is not an ONNX model that can be read"):
            read_onnx(path)
    for content in (b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff" * 64, b"name: pipeline\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an ONNX model that can be read"):
            read_onnx(path)


def test_a_tensor_that_is_not_as_long_as_its_shape_says_is_told(tmp_path: Path) -> None:
    for dims in ([2**40, 2**40], [3], [-1, -2]):
        tensor = PROTO["Tensor"](name="m", dims=dims, data_type=1, raw_data=bytes(8))
        with pytest.raises(ValueError, match="is not an ONNX model"):
            read_onnx(model(tmp_path / "net.onnx", [], [tensor]))


# --- the network in it ------------------------------------------------------------------------------------------


def exported(state: dict[str, NDArray[np.float32]]) -> Iterator[tuple[Any, Any]]:
    """Operation and tensor of each weight, as torch's exporter writes them; either may be None."""
    number = 0
    for name, value in state.items():
        if name == "embeddings.position_embeddings":
            yield (
                PROTO["Node"](name="/backbone/embeddings/Concat_6", input=["sliced", "rest"]),
                raw("sliced", value[:, :1]),
            )
            yield (
                PROTO["Node"](name="/backbone/embeddings/Reshape_1", input=["grid"]),
                raw("grid", value[:, 1:]),
            )
        elif name.endswith(".weight") and value.ndim == 2:
            number += 1
            # `layer.0` is one name.
            of = re.sub(r"\.(?!\d)", "/", name.removesuffix(".weight"))
            reads = ["x", f"onnx::MatMul_{number}"]
            yield (
                PROTO["Node"](name=f"/backbone/{of}/MatMul", op_type="MatMul", input=reads),
                raw(reads[1], value.T),
            )
        else:
            yield None, raw(f"backbone.{name}", value)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small `Dinov2Model` of transformers, in whose shape the converter is told to look."""
    mend_torchvision()
    transformers = pytest.importorskip("transformers")
    sizes = {"_DIM": 16, "_DEPTH": 2, "_HEADS": 2, "_GRID": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(dinov2_focus, name, size)
    wide = [(part, before * 16 // 384, after * 16 // 384) for part, before, after in dinov2_focus._MATRICES]
    monkeypatch.setattr(dinov2_focus, "_MATRICES", wide)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, use_mask_token=False
    )
    return transformers.Dinov2Model(config).eval()


@pytest.mark.heavy
def test_the_network_is_that_of_transformers_weight_by_weight(theirs: Any, tmp_path: Path) -> None:
    import torch
    import transformers

    rng = np.random.default_rng(1)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(torch.from_numpy(rng.normal(size=value.shape).astype(np.float32) * 0.3))
    theirs.save_pretrained(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    pairs = list(exported(state))
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "out").mkdir()
    model(
        inside / dinov2_focus.MODEL,
        [node for node, _ in pairs if node is not None],
        [
            raw("decoder.conv.weight", rng.normal(size=(2, 2)).astype(np.float32)),
            *(tensor for _, tensor in pairs),
        ],
    )
    dinov2_focus.convert(inside, tmp_path / "out")
    ours, told = transformers.AutoModel.from_pretrained(
        tmp_path / "out", use_safetensors=True, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.from_numpy(rng.normal(size=(2, 3, 42, 42)).astype(np.float32))
    with torch.no_grad():
        wanted, found = theirs(pixels), ours.eval()(pixels)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["patch_size"] == 14


@pytest.mark.heavy
def test_a_network_that_lacks_a_tensor_is_refused(theirs: Any, tmp_path: Path) -> None:
    tensors = [raw("backbone.embeddings.cls_token", np.zeros((1, 1, 8), np.float32))]
    model(tmp_path / dinov2_focus.MODEL, [], tensors)
    with pytest.raises(ValueError, match=r"cls_token should have the shape \(1, 1, 16\): it has \(1, 1, 8\)"):
        dinov2_focus.convert(tmp_path, tmp_path)


@pytest.mark.slow
def test_the_real_weights_load_strictly_into_transformers() -> None:
    mend_torchvision()
    transformers = pytest.importorskip("transformers")
    folder = cache_folder() / "dinov2-focus"
    if not folder.is_dir():
        pytest.skip(f"python -m orchestrator.data.weights dinov2-focus {folder}")
    net, told = transformers.AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(value.numel() for value in net.parameters()) == pytest.approx(22.06e6, rel=0.001)
    assert weights.DINOV2_FOCUS.made == tuple(sorted(path.name for path in folder.iterdir()))[::-1]
