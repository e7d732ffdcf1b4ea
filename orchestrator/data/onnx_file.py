"""The weights in an ONNX file, and which operation reads which: enough to take a network out of one.

ONNX is protobuf (https://onnx.ai/onnx/repo-docs/IR.html, onnx.proto), of which a reader needs little: a field is a
number, a wire type and a value, and a value of wire type 2 may be a message again. So no package is needed, and no code
of the file's author is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_VARINT, _EIGHT_BYTES, _MESSAGE, _FOUR_BYTES = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_TENSOR = 5
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_LOCATION = 1, 2, 4, 8, 9, 14
_FLOAT, _EXTERNAL = 1, 1


@dataclass(frozen=True)
class OnnxGraph:
    """The float32 tensors that a file holds, by name, and the names that each operation reads, by its own name.

    The value of a `Constant` operation is a tensor under the name of its output.
    """

    tensors: dict[str, Floats]
    reads: dict[str, tuple[str, ...]]

    def operand(self, operation: str, shape: Sequence[int]) -> Floats:
        """The one tensor of this shape that an operation reads.

        Raises:
            ValueError: there is no such operation, or it reads none or several of this shape.
        """
        if operation not in self.reads:
            raise ValueError(f"there is no operation {operation}")
        names = [name for name in self.reads[operation] if name in self.tensors]
        found = [self.tensors[name] for name in names if self.tensors[name].shape == tuple(shape)]
        if len(found) != 1:
            has = ", ".join(str(self.tensors[name].shape) for name in names) or "none"
            raise ValueError(f"{operation} reads {len(found)} tensors of shape {tuple(shape)}; it has {has}")
        return found[0]


def read_onnx(path: Path) -> OnnxGraph:
    """The graph of an ONNX model. Tensors of other types than float32, and data in other files, are left out.

    Raises:
        ValueError: it is not an ONNX model, or not a whole one.
        OSError: it cannot be read.
    """
    try:
        graphs = [value for number, value in _fields(memoryview(path.read_bytes())) if number == _MODEL_GRAPH]
        if len(graphs) != 1:
            raise ValueError("it has no graph")
        return _graph(_message(graphs[0]))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not an ONNX model that can be read: {error}") from error


def _graph(data: memoryview) -> OnnxGraph:
    found = OnnxGraph({}, {})
    for number, value in _fields(data):
        if number == _GRAPH_INITIALIZER:
            name, tensor = _tensor(_message(value))
            if tensor is not None:
                found.tensors[name] = tensor
        elif number == _GRAPH_NODE:
            _add_node(_message(value), found)
    return found


def _add_node(data: memoryview, graph: OnnxGraph) -> None:
    inputs, outputs, name, op = [], [], "", ""
    attributes = []
    for number, value in _fields(data):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            outputs.append(_text(value))
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_OP:
            op = _text(value)
        elif number == _NODE_ATTRIBUTE:
            attributes.append(_message(value))
    graph.reads[name] = tuple(inputs)
    if op != "Constant" or len(outputs) != 1:
        return
    for attribute in attributes:
        for number, value in _fields(attribute):
            if number == _ATTRIBUTE_TENSOR and (tensor := _tensor(_message(value))[1]) is not None:
                graph.tensors[outputs[0]] = tensor


def _tensor(data: memoryview) -> tuple[str, Floats | None]:
    """Name and values; None unless they are float32 and in this file."""
    name, kind, location = "", 0, 0
    dims: list[int] = []
    raw: memoryview | None = None
    floats: list[memoryview] = []
    for number, value in _fields(data):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == _TENSOR_TYPE:
            kind = _number(value)
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_RAW:
            raw = _message(value)
        elif number == _TENSOR_FLOATS:
            floats.append(_message(value))
        elif number == _TENSOR_LOCATION:
            location = _number(value)
    if kind != _FLOAT or location == _EXTERNAL:
        return name, None
    content = b"".join(floats) if raw is None else raw
    if len(content) != 4 * math.prod(dims):
        raise ValueError(f"the tensor {name} of shape {tuple(dims)} has {len(content)} bytes")
    return name, np.frombuffer(content, "<f4").reshape(dims)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == _MESSAGE:
            length, at = _varint(data, at)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field has the wire type {wire}")
        if at + length > len(data):
            raise ValueError("it ends within a field")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _varints(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a field that should be a number has another type")
    return value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field that should be a message is a number")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8")
