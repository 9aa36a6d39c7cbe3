"""Messages of the Open Inference Protocol, version 2, to and from arrays by name.

Messages are gRPC, or JSON with Triton's binary tensor data extension. A model's inputs are vectors;
other shapes are refused. Nothing is allocated by the claims of a message: elements are counted in
the data, and the shape must agree.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from torchrec_kvshare import __version__
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features.decode import cut
from torchrec_kvshare.features.parse import REPORTS, UNKNOWN_IDS
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.serving.columns import (
    BOOL,
    BYTES,
    DTYPE_BY_DATATYPE,
    FP32,
    FP64,
    INT64,
    ColumnSpec,
    byte_elements,
    column_specs,
    datatype_of,
    output_specs,
)

SERVER = PLATFORM = "torchrec_kvshare"
EXTENSIONS = ["binary_tensor_data", "sequence"]

MAX_NAME = 200  # characters of an input's name
MAX_FIELDS = 4096  # of a message: inputs, their data, outputs and parameters together
LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
# Wire types of protobuf.
VARINT, LENGTH_DELIMITED = 0, 2
FIXED_BYTES = {1: 8, 5: 4}
CONTENTS_BY_DATATYPE = {
    INT64: "int64_contents",
    BYTES: "bytes_contents",
    FP32: "fp32_contents",
    FP64: "fp64_contents",
    BOOL: "bool_contents",
}
JSON_TYPES_BY_DATATYPE: dict[str, set[type]] = {
    INT64: {int},
    BYTES: {str},
    FP32: {int, float},
    FP64: {int, float},
    BOOL: {bool},
}


def parse_infer(request: bytes) -> service_pb2.ModelInferRequest:
    """Parse a gRPC message, counting its fields first.

    An output without a name takes two bytes on the wire and 48 in memory, so that a message of
    2 MiB would take 48.

    Raises:
        RequestError: if the bytes are no message, or it has more than ``MAX_FIELDS`` fields.
    """
    position, num_fields = 0, 0
    while position < len(request) and num_fields <= MAX_FIELDS:
        num_fields += 1
        position = _end_of_field(request, position)
    if num_fields > MAX_FIELDS:
        raise RequestError(
            f"the message has more than {MAX_FIELDS} inputs, outputs and parameters; "
            f"at most {MAX_FIELDS} are allowed"
        )
    try:
        return service_pb2.ModelInferRequest.FromString(request)
    except DecodeError as error:
        raise RequestError(f"the bytes are no ModelInferRequest: {error}") from error


def decode_infer(request: service_pb2.ModelInferRequest) -> dict[str, NDArray[Any]]:
    """Decode the inputs of a gRPC message.

    Args:
        request: with data in ``raw_input_contents`` or in the ``contents`` of each input.

    Returns:
        Vectors by name, in the message's order; elements of BYTES are bytes.

    Raises:
        RequestError: naming the tensor, what came and what was allowed.
    """
    buffers = request.raw_input_contents
    if buffers and len(buffers) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(buffers)} entries; the request has "
            f"{len(request.inputs)} inputs, one entry per input"
        )
    tensors: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name = _new_name(tensor.name, tensors)
        datatype = _datatype(name, tensor.datatype)
        if not buffers:
            elements = _from_contents(name, datatype, tensor.contents)
        elif tensor.contents.ByteSize():
            raise RequestError(f"{name} has both contents and raw_input_contents; one is allowed")
        else:
            elements = _from_buffer(name, datatype, buffers[index])
        tensors[name] = _shaped(name, elements, list(tensor.shape))
    return tensors


def encode_infer(
    model_name: str,
    model_version: str,
    request_id: str,
    outputs: Mapping[str, NDArray[Any]],
    requested: Sequence[str],
) -> service_pb2.ModelInferResponse:
    """Encode an answer as a gRPC message.

    Args:
        model_name: as in the request.
        model_version: of the model that scored.
        request_id: of the request; may be empty.
        outputs: vectors by name.
        requested: names of the outputs to send; empty for all.

    Returns:
        The message, with data in ``raw_output_contents``.

    Raises:
        RequestError: if a requested output does not exist.
    """
    response = service_pb2.ModelInferResponse(
        model_name=model_name, model_version=model_version, id=request_id
    )
    # An output that is requested twice is sent once.
    for name in dict.fromkeys(requested or outputs):
        tensor = outputs[_output(name, outputs)]
        response.outputs.add(name=name, datatype=datatype_of(tensor), shape=tensor.shape)
        response.raw_output_contents.append(_to_buffer(tensor))
    return response


def decode_infer_json(head: Mapping[str, Any], binary: bytes) -> dict[str, NDArray[Any]]:
    """Decode the inputs of an HTTP message.

    Args:
        head: the decoded JSON object.
        binary: bytes after the JSON: data of inputs with a ``binary_data_size``, in their order.

    Returns:
        As ``decode_infer``.

    Raises:
        RequestError: naming the tensor, what came and what was allowed.
    """
    tensors: dict[str, NDArray[Any]] = {}
    start = 0
    for tensor in _objects(head, "inputs"):
        name = _new_name(tensor.get("name"), tensors)
        datatype = _datatype(name, tensor.get("datatype"))
        size = _binary_size(name, tensor, len(binary) - start)
        if size is None:
            elements = _from_json(name, datatype, tensor["data"])
        else:
            elements = _from_buffer(name, datatype, binary[start : start + size])
            start += size
        tensors[name] = _shaped(name, elements, tensor.get("shape"))
    if start != len(binary):
        raise RequestError(
            f"{len(binary)} bytes follow the JSON; its inputs have a binary_data_size of {start}"
        )
    return tensors


def requested_outputs_json(head: Mapping[str, Any], schema: FeatureSchema) -> dict[str, bool]:
    """Return the outputs that an HTTP message requests, and which of them as binary data.

    Args:
        head: the decoded JSON object.
        schema: of the model.

    Returns:
        Whether the output is binary, by its name; all outputs if the message names none.

    Raises:
        RequestError: naming the output, what came and what was allowed.
    """
    known = [spec.name for spec in output_specs(schema)]
    known += [UNKNOWN_IDS] * (UNKNOWN_IDS in requested_report_json(head))
    default = _flag(head, "binary_data_output", False, "the request")
    binary_by_output = {}
    for output in _objects(head, "outputs"):
        name = _output(output.get("name"), known)
        binary_by_output[name] = _flag(output, "binary_data", default, f"the output {name}")
    return binary_by_output or dict.fromkeys(known, default)


def requested_report(request: service_pb2.ModelInferRequest) -> list[str]:
    """Return the parameter ``report`` of a gRPC message, as a request's ``report``.

    Raises:
        RequestError: if the parameter has an unknown value.
    """
    if "report" not in request.parameters:
        return []
    return _report(request.parameters["report"].string_param)


def requested_report_json(head: Mapping[str, Any]) -> list[str]:
    """Return the parameter ``report`` of an HTTP message, as ``requested_report`` does."""
    report = _parameters(head, "the request").get("report")
    return [] if report is None else _report(report)


def encode_infer_json(
    model_name: str,
    model_version: str,
    request_id: str,
    outputs: Mapping[str, NDArray[Any]],
    binary_by_output: Mapping[str, bool],
) -> tuple[bytes, int | None]:
    """Encode an answer as an HTTP body.

    Args:
        model_name: as in the request.
        model_version: of the model that scored.
        request_id: of the request; may be empty.
        outputs: vectors by name.
        binary_by_output: from ``requested_outputs_json``.

    Returns:
        The body, and the length of its JSON if binary data follow it.
    """
    tensors, buffers = [], []
    for name, is_binary in binary_by_output.items():
        array = outputs[name]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array)}
        tensor["shape"] = list(array.shape)
        if is_binary:
            buffers.append(_to_buffer(array))
            tensor["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            elements = array.tolist()
            is_text = array.dtype == object
            tensor["data"] = [e.decode() for e in elements] if is_text else elements
        tensors.append(tensor)
    head = {"model_name": model_name, "model_version": model_version, "outputs": tensors}
    if request_id:
        head["id"] = request_id
    text = json.dumps(head, allow_nan=False).encode()
    return b"".join([text, *buffers]), len(text) if buffers else None


def model_metadata(name: str, versions: Sequence[str], schema: FeatureSchema) -> dict[str, Any]:
    """Return the metadata of a model: the fields of ``ModelMetadataResponse``."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_spec_json(spec) for spec in column_specs(schema)],
        "outputs": [_spec_json(spec) for spec in output_specs(schema)],
    }


def server_metadata() -> dict[str, Any]:
    """Return the metadata of this server: the fields of ``ServerMetadataResponse``."""
    return {"name": SERVER, "version": __version__, "extensions": EXTENSIONS}


def _spec_json(spec: ColumnSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatypes[0], "shape": list(spec.shape)}


# --- checks of gRPC and HTTP messages


def _report(word: Any) -> list[str]:
    if not isinstance(word, str) or word not in REPORTS:
        raise RequestError(
            f"the parameter report is {_short(word)}; one of {list(REPORTS)} is allowed"
        )
    return [word]


def _new_name(name: Any, tensors: Mapping[str, Any]) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        came = f"{len(name)} characters" if isinstance(name, str) else type(name).__name__
        raise RequestError(f"an input's name is {came}; a text of {MAX_NAME} at most is allowed")
    if name in tensors:
        raise RequestError(f"the input {name!r} appears twice")
    return name


def _datatype(name: str, datatype: Any) -> str:
    if not isinstance(datatype, str) or datatype not in DTYPE_BY_DATATYPE:
        raise RequestError(
            f"{name} is of datatype {_short(datatype)}; one of {list(DTYPE_BY_DATATYPE)} is allowed"
        )
    return datatype


def _output(name: Any, known: Collection[str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"{_short(name)} is no output; the outputs are {list(known)}")
    return name


def _shaped(name: str, elements: NDArray[Any], shape: Any) -> NDArray[Any]:
    """Return the elements if their shape is right."""
    if shape != [elements.size]:
        sizes = [_short(size) for size in shape[:8]] if isinstance(shape, list) else _short(shape)
        raise RequestError(
            f"{name} has {elements.size} elements; its shape is {sizes}, "
            f"and [{elements.size}] is allowed"
        )
    return elements


def _short(value: Any) -> Any:
    """Return a number, the start of a text, or the type of anything else, which may be large."""
    if isinstance(value, str):
        return cut(value)
    is_small = type(value) is int and abs(value) < 2**64
    return value if is_small else type(value).__name__


# --- buffers of gRPC and HTTP messages


def _from_buffer(name: str, datatype: str, buffer: bytes) -> NDArray[Any]:
    dtype = DTYPE_BY_DATATYPE[datatype]
    if datatype == BYTES:
        return np.array(_byte_elements(name, buffer), dtype=dtype)
    if len(buffer) % dtype.itemsize:
        raise RequestError(
            f"{name} has {len(buffer)} bytes of data; an element of {datatype} has {dtype.itemsize}"
        )
    return np.frombuffer(buffer, dtype)


def _byte_elements(name: str, buffer: bytes) -> list[bytes]:
    elements, end = [], 0
    while end < len(buffer):
        start = end + LENGTH_BYTES
        end = start + int.from_bytes(buffer[start - LENGTH_BYTES : start], "little")
        elements.append(buffer[start:end])
    if end != len(buffer):
        raise RequestError(
            f"{name} has {len(buffer)} bytes of data; its last element would end at byte {end}"
        )
    return elements


def _to_buffer(tensor: NDArray[Any]) -> bytes:
    if tensor.dtype != object:
        return tensor.tobytes()
    elements = tensor.tolist()
    return b"".join(len(e).to_bytes(LENGTH_BYTES, "little") + e for e in elements)


# --- gRPC


def _end_of_field(message: bytes, position: int) -> int:
    """Return the end of the field that starts at a position."""
    tag, position = _varint(message, position)
    kind = tag & 7
    if kind == VARINT:
        return _varint(message, position)[1]
    if kind == LENGTH_DELIMITED:
        length, position = _varint(message, position)
        return position + length
    if kind not in FIXED_BYTES:
        raise RequestError(f"the bytes are no ModelInferRequest: a field has wire type {kind}")
    return position + FIXED_BYTES[kind]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number and its end."""
    value = shift = 0
    while position < len(message) and shift < 64:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            break
    return value, position


def _from_contents(
    name: str, datatype: str, contents: service_pb2.InferTensorContents
) -> NDArray[Any]:
    expected = CONTENTS_BY_DATATYPE[datatype]
    filled = [field.name for field, _ in contents.ListFields()]
    if filled not in ([], [expected]):
        raise RequestError(f"{name} has data in {filled}; {datatype} has them in {expected}")
    return np.array(list(getattr(contents, expected)), dtype=DTYPE_BY_DATATYPE[datatype])


# --- JSON


def _from_json(name: str, datatype: str, elements: Any) -> NDArray[Any]:
    if not isinstance(elements, list):
        raise RequestError(f"{name}.data is {type(elements).__name__}; a flat list is allowed")
    allowed = JSON_TYPES_BY_DATATYPE[datatype]
    wrong = set(map(type, elements)) - allowed
    if wrong:
        raise RequestError(
            f"{name}.data holds {_names(wrong)}; {_names(allowed)} is allowed in {datatype}"
        )
    if datatype == BYTES:
        return byte_elements(elements, name)
    try:
        # A number beyond FP32 becomes infinity, which the column then refuses.
        with np.errstate(over="ignore"):
            return np.array(elements, dtype=DTYPE_BY_DATATYPE[datatype])
    except OverflowError as error:
        raise RequestError(f"{name}.data holds an integer that is too large: {datatype}") from error


def _names(types: set[type]) -> str:
    return " or ".join(sorted(one.__name__ for one in types))


def _binary_size(name: str, tensor: Mapping[str, Any], left: int) -> int | None:
    """Return the number of bytes after the JSON of an input; None if its data are in the JSON."""
    size = _parameters(tensor, name).get("binary_data_size")
    if (size is None) == (tensor.get("data") is None):
        raise RequestError(f"{name} has data or binary_data_size; one of them is allowed")
    if size is not None and (type(size) is not int or not 0 <= size <= left):
        raise RequestError(
            f"{name} has a binary_data_size of {_short(size)}; 0 to {left} bytes are there"
        )
    return size


def _flag(owner: Mapping[str, Any], key: str, default: bool, name: str) -> bool:
    flag = _parameters(owner, name).get(key, default)
    if type(flag) is not bool:
        raise RequestError(f"{key} of {name} is {_short(flag)}; true or false is allowed")
    return flag


def _parameters(owner: Mapping[str, Any], name: str) -> dict[str, Any]:
    parameters = owner.get("parameters")
    if not isinstance(parameters, dict | None):
        raise RequestError(
            f"parameters of {name} are {type(parameters).__name__}; an object is allowed"
        )
    return parameters or {}


def _objects(head: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    tensors = head.get(key)
    if tensors is None:
        return []
    if not isinstance(tensors, list) or not all(isinstance(one, dict) for one in tensors):
        raise RequestError(f"{key} is {type(tensors).__name__}; a list of objects is allowed")
    if len(tensors) > MAX_FIELDS:
        raise RequestError(f"{key} has {len(tensors)} entries; at most {MAX_FIELDS} are allowed")
    return tensors
