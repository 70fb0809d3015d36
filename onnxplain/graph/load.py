"""From a file, bytes or an object in memory to a checked model of our own."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxplain.errors import ExternalDataError, ModelError, UnsupportedModelError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | onnx.ModelProto | ir.Model

# Protobuf refuses larger messages; larger models keep their weights in external files.
_PROTOBUF_LIMIT = 2**31 - 1


def load(source: Source, external_data_dir: str | os.PathLike[str] | None = None) -> ir.Model:
    """A model that shares nothing mutable with its source.

    Sizes are compared with the bytes that are really there before anything is allocated. External
    weights stay in their files, memory-mapped, and must lie inside one folder.

    Args:
        source: a path, the bytes of a file, or a model in memory (which is not changed).
        external_data_dir: the folder of external weights; default, the folder of the file.

    Raises:
        ModelError: missing, empty, truncated, not an ONNX model, or inconsistent in itself.
        ExternalDataError: external weights missing, too short, or outside the folder.
        UnsupportedModelError: sparse initializers.
    """
    folder = None if external_data_dir is None else Path(external_data_dir)
    if isinstance(source, ir.Model):
        model = source.clone()
    else:
        if isinstance(source, onnx.ModelProto):
            proto = source
        elif isinstance(source, bytes | bytearray | memoryview):
            proto = _parse(bytes(source), "the model's bytes")
        elif isinstance(source, str | os.PathLike):
            path = Path(source)
            folder = folder or path.parent
            proto = _parse(_read(path), f"'{path}'")
        else:
            raise ModelError(
                f"a model can't be loaded from {type(source).__name__}; give a path, bytes, "
                "onnx.ModelProto or onnx_ir.Model"
            )
        model = _deserialize(proto, folder)
    _own_tensors(model, folder)
    _check_values(model)
    return model


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder; give the .onnx file in it")
    try:
        if path.stat().st_size > _PROTOBUF_LIMIT:
            raise ModelError(
                f"'{path}' is larger than 2 GB, which the ONNX format does not allow in one file; "
                "save the model with external data"
            )
        return path.read_bytes()
    except FileNotFoundError as e:
        raise ModelError(f"there is no file '{path}'; check the path") from e
    except OSError as e:
        raise ModelError(f"'{path}' can't be read: {e.strerror}") from e


def _parse(data: bytes, what: str) -> onnx.ModelProto:
    if not data:
        raise ModelError(f"{what} is empty; export or download the model again")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as e:
        raise ModelError(
            f"{what} is not an ONNX model, or is truncated ({len(data)} bytes can't be decoded as "
            "one); export or download it again"
        ) from e
    if not proto.HasField("graph") or not (proto.ir_version or proto.opset_import):
        raise ModelError(f"{what} holds no ONNX graph; it is not an ONNX model, or is truncated")
    return proto


def _deserialize(proto: onnx.ModelProto, folder: Path | None) -> ir.Model:
    if not proto.HasField("graph"):
        raise ModelError("the model holds no graph; export it again")
    for tensor in _tensors(proto):
        _check_tensor(tensor, folder)
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as e:  # the deserializer raises many types for malformed messages
        cause: BaseException = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the model is malformed: {cause}") from e


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: of the graph, its subgraphs and the functions."""
    graphs, nodes = [proto.graph], [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            if graph.sparse_initializer:
                raise UnsupportedModelError(
                    f"initializer '{graph.sparse_initializer[0].values.name}' is sparse, which is "
                    "not supported; export the model with dense weights"
                )
            yield from graph.initializer
            nodes.extend(graph.node)
        else:
            for attr in nodes.pop().attribute:
                if attr.HasField("t"):
                    yield attr.t
                yield from attr.tensors
                graphs.extend([attr.g] if attr.HasField("g") else [])
                graphs.extend(attr.graphs)


def _check_tensor(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Compare what a tensor declares with the bytes that are there."""
    name, dims = tensor.name, list(tensor.dims)
    try:
        dtype = ir.DataType(tensor.data_type)
        bits = 0 if dtype == ir.DataType.STRING else dtype.bitwidth
    except (ValueError, TypeError) as e:
        raise ModelError(f"tensor '{name}' has the unknown data type {tensor.data_type}") from e
    if any(d < 0 for d in dims):
        raise ModelError(f"tensor '{name}' has a negative dimension: {dims}")
    count = math.prod(dims)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise ExternalDataError(f"tensor '{name}' of strings can't be external data")
        info = {e.key: e.value for e in tensor.external_data}
        try:
            offset, length = int(info.get("offset", 0)), int(info.get("length", -1))
        except ValueError as e:
            raise ExternalDataError(
                f"tensor '{name}': external offset or length is not a number ({info})"
            ) from e
        if "length" in info and length < 0:
            raise ExternalDataError(f"tensor '{name}': negative external length {length}")
        nbytes = (count * bits + 7) // 8
        _check_external(name, info.get("location", ""), offset, length, nbytes, folder)
        return
    if tensor.HasField("raw_data"):
        have, need, unit = len(tensor.raw_data), (count * bits + 7) // 8, "bytes"
    else:
        field, need = _typed_field(dtype, count)
        have, unit = len(getattr(tensor, field)), f"items in {field}"
    if have != need:
        raise ModelError(
            f"tensor '{name}' of shape {dims} and type {dtype.name} needs {need} {unit}, but holds "
            f"{have}; the file is damaged, export or download it again"
        )


def _typed_field(dtype: ir.DataType, count: int) -> tuple[str, int]:
    """The protobuf field that holds a dtype when there is no raw data, and its length."""
    t = ir.DataType
    fields = {
        t.FLOAT: ("float_data", count),
        t.COMPLEX64: ("float_data", 2 * count),
        t.DOUBLE: ("double_data", count),
        t.COMPLEX128: ("double_data", 2 * count),
        t.INT64: ("int64_data", count),
        t.UINT32: ("uint64_data", count),
        t.UINT64: ("uint64_data", count),
        t.STRING: ("string_data", count),
    }
    packed = {4: (count + 1) // 2, 2: (count + 3) // 4}
    return fields.get(dtype) or ("int32_data", packed.get(dtype.bitwidth, count))


def _check_external(
    name: str, location: str, offset: int, length: int, nbytes: int, folder: Path | None
) -> None:
    """Refuse external weights that lie outside ``folder`` or don't fill their tensor.

    ``length`` is -1 where the model doesn't state it.
    """
    if folder is None:
        raise ExternalDataError(
            f"tensor '{name}' is external data ('{location}'), but the model did not come from a "
            "file; give the folder as external_data_dir"
        )
    posix = PurePosixPath(location.replace("\\", "/"))
    absolute = posix.is_absolute() or bool(PureWindowsPath(location).drive)
    path = folder / posix
    if not location or absolute or ".." in posix.parts:
        raise ExternalDataError(
            f"tensor '{name}': external data '{location}' is not a plain path inside the model's "
            "folder; save the model's weights beside it"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ExternalDataError(
            f"tensor '{name}': external data '{path}' is a link to '{path.resolve()}', outside "
            "the model's folder; copy the file itself beside the model"
        )
    if not path.is_file():
        raise ExternalDataError(
            f"tensor '{name}': there is no external data file '{path}'; put it beside the model, "
            "or give its folder as external_data_dir"
        )
    stat = path.stat()
    if stat.st_nlink > 1:
        raise ExternalDataError(
            f"external data file '{path}' is hard-linked to a second name, which can't be checked "
            "to lie inside the model's folder; copy the file"
        )
    if offset < 0 or offset + nbytes > stat.st_size or (length not in (-1, nbytes)):
        stated = "unstated" if length < 0 else length
        raise ExternalDataError(
            f"tensor '{name}' needs {nbytes} bytes at offset {offset} of '{path}' (stated length: "
            f"{stated}), but the file has {stat.st_size} bytes; the model and its weights don't "
            "belong together, or the file is truncated"
        )


def _own_tensors(model: ir.Model, folder: Path | None) -> None:
    """Replace every tensor by one that shares its bytes, but neither name nor protobuf."""
    roots = [model.graph, *(f.graph for f in model.functions.values())]
    graphs: Iterable[ir.Graph] = (g for root in roots for g in (root, *root.subgraphs()))
    for graph in graphs:
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _own(value.const_value, folder)
                value.type = ir.TensorType(value.const_value.dtype)
                value.shape = ir.Shape(value.const_value.shape.numpy())
        for node in graph:
            for key, attr in list(node.attributes.items()):
                if attr.is_ref():
                    continue
                if attr.type == ir.AttributeType.TENSOR:
                    node.attributes[key] = ir.AttrTensor(key, _own(attr.as_tensor(), folder))
                elif attr.type == ir.AttributeType.TENSORS:
                    owned = [_own(t, folder) for t in attr.as_tensors()]
                    node.attributes[key] = ir.AttrTensors(key, owned)


def _own(tensor: ir.TensorProtocol, folder: Path | None) -> ir.TensorProtocol:
    name, shape = tensor.name or "", ir.Shape(tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        place, location = folder or Path(tensor.base_dir), os.fspath(tensor.location)
        length = -1 if tensor.length is None else tensor.length
        offset = tensor.offset or 0
        _check_external(name, location, offset, length, tensor.nbytes, place)
        return ir.ExternalTensor(
            location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=place
        )
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=shape, name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=shape, name=name)


def _check_values(model: ir.Model) -> None:
    """Every value read is defined once, and the graph has an output."""
    if not model.graph.outputs:
        raise ModelError("the graph has no outputs; export the model again")
    domains = {node.domain for node in model.graph.all_nodes()}
    if "" in domains and not {"", "ai.onnx"} & set(model.opset_imports):
        raise ModelError(
            "the model does not say which opset its operators are of; the file is truncated or "
            "malformed, export or download it again"
        )
    for function in model.functions.values():
        _check_scope(function.graph, set())
    _check_scope(model.graph, set())


def _check_scope(graph: ir.Graph, outer: set[ir.Value]) -> None:
    values = [*graph.inputs, *(v for v in graph.initializers.values() if v not in graph.inputs)]
    values += [v for node in graph for v in node.outputs if v.name]
    names: set[str] = set()
    for value in values:
        if value.name in names:
            raise ModelError(f"two values are named '{value.name}'; the model is malformed")
        names.add(value.name or "")
    inside = outer | set(values)
    reads = [(f"node '{n.name or n.op_type}'", v) for n in graph for v in n.inputs]
    for reader, read in [*reads, *(("the output", v) for v in graph.outputs)]:
        if read is not None and read not in inside:
            raise ModelError(
                f"{reader} reads the value '{read.name}', which nothing computes; the file is "
                "truncated or malformed, export or download it again"
            )
    for node in graph:
        for attr in node.attributes.values():
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.GRAPH:
                _check_scope(attr.as_graph(), inside)
            elif attr.type == ir.AttributeType.GRAPHS:
                for inner in attr.as_graphs():
                    _check_scope(inner, inside)
