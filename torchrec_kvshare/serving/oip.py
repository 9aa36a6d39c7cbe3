"""Messages of the Open Inference Protocol, version 2, to and from arrays by name.

Both faces are here, gRPC and JSON, the latter with Triton's binary tensor data extension. A model's
inputs are vectors, so that other shapes are refused. Nothing is allocated for what a message only
claims to hold: elements are counted in the data, and the shape must agree.
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

MAX_NAME = 200  # characters of an input's name, or of a text shown in an error
MAX_FIELDS = 4096  # of a message: inputs, their data, outputs and parameters, each counted
LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
# Of a field on protobuf's wire.
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
    """A gRPC message, of which no more is made than its bytes allow.

    An output without a name is two bytes and becomes an object of 48: two MiB of them were 48. The
    fields are counted before anything is made of them.

    Raises:
        RequestError: if the bytes are no message, or it has more than ``MAX_FIELDS`` fields.
    """
    place, num_fields = 0, 0
    while place < len(request) and num_fields <= MAX_FIELDS:
        num_fields += 1
        place = _end_of_field(request, place)
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
    """The inputs of a gRPC message.

    Args:
        request: its data in ``raw_input_contents`` or in each input's ``contents``.

    Returns:
        Vectors by name, in the message's order; elements of BYTES are bytes.

    Raises:
        RequestError: naming the tensor, what came and what was allowed.
    """
    buffers = request.raw_input_contents
    if buffers and len(buffers) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(buffers)} entries; the request has "
            f"{len(request.inputs)} inputs, and they are one for each"
        )
    tensors: dict[str, NDArray[Any]] = {}
    for place, tensor in enumerate(request.inputs):
        name = _new_name(tensor.name, tensors)
        datatype = _datatype(name, tensor.datatype)
        if not buffers:
            elements = _from_contents(name, datatype, tensor.contents)
        elif tensor.contents.ByteSize():
            raise RequestError(f"{name} has both contents and raw_input_contents; one is allowed")
        else:
            elements = _from_buffer(name, datatype, buffers[place])
        tensors[name] = _shaped(name, elements, list(tensor.shape))
    return tensors


def encode_infer(
    model_name: str,
    model_version: str,
    request_id: str,
    outputs: Mapping[str, NDArray[Any]],
    requested: Sequence[str],
) -> service_pb2.ModelInferResponse:
    """The gRPC message of an answer.

    Args:
        model_name: as it was asked for.
        model_version: of the model that scored.
        request_id: of the request; may be empty.
        outputs: vectors by name.
        requested: names of those that are wanted; none for all.

    Returns:
        The message, its data in ``raw_output_contents``.

    Raises:
        RequestError: if an output is requested that there is not.
    """
    response = service_pb2.ModelInferResponse(
        model_name=model_name, model_version=model_version, id=request_id
    )
    # An output that is asked for twice is sent once.
    for name in dict.fromkeys(requested or outputs):
        tensor = outputs[_output(name, outputs)]
        response.outputs.add(name=name, datatype=datatype_of(tensor), shape=tensor.shape)
        response.raw_output_contents.append(_to_buffer(tensor))
    return response


def decode_infer_json(head: Mapping[str, Any], binary: bytes) -> dict[str, NDArray[Any]]:
    """The inputs of an HTTP message.

    Args:
        head: the decoded JSON object.
        binary: what follows it: the data of inputs with a ``binary_data_size``, in their order.

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


def requested_outputs_json(head: Mapping[str, Any]) -> dict[str, bool]:
    """Which outputs an HTTP message asks for, and which of them as binary data.

    Args:
        head: the decoded JSON object.

    Returns:
        Whether it is binary, by the output's name; all outputs where the message names none.

    Raises:
        RequestError: naming the output, what came and what was allowed.
    """
    known = [spec.name for spec in output_specs()]
    known += [UNKNOWN_IDS] * (UNKNOWN_IDS in requested_report_json(head))
    default = _flag(head, "binary_data_output", False, "the request")
    binary_by_output = {}
    for output in _objects(head, "outputs"):
        name = _output(output.get("name"), known)
        binary_by_output[name] = _flag(output, "binary_data", default, f"the output {name}")
    return binary_by_output or dict.fromkeys(known, default)


def requested_report(request: service_pb2.ModelInferRequest) -> list[str]:
    """What a gRPC message asks its answer to tell, as a request's ``report``.

    Raises:
        RequestError: if its parameter ``report`` says anything else.
    """
    if "report" not in request.parameters:
        return []
    return _report(request.parameters["report"].string_param)


def requested_report_json(head: Mapping[str, Any]) -> list[str]:
    """The same, of an HTTP message."""
    report = _parameters(head, "the request").get("report")
    return [] if report is None else _report(report)


def encode_infer_json(
    model_name: str,
    model_version: str,
    request_id: str,
    outputs: Mapping[str, NDArray[Any]],
    binary_by_output: Mapping[str, bool],
) -> tuple[bytes, int | None]:
    """The body of an HTTP answer.

    Args:
        model_name: as it was asked for.
        model_version: of the model that scored.
        request_id: of the request; may be empty.
        outputs: vectors by name.
        binary_by_output: as ``requested_outputs_json`` gives it.

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


def model_metadata_json(
    name: str, versions: Sequence[str], schema: FeatureSchema
) -> dict[str, Any]:
    """What a model takes and gives, as the HTTP face tells it."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_spec_json(spec) for spec in column_specs(schema)],
        "outputs": [_spec_json(spec) for spec in output_specs()],
    }


def model_metadata_message(
    name: str, versions: Sequence[str], schema: FeatureSchema
) -> service_pb2.ModelMetadataResponse:
    """The same, as the gRPC face tells it."""
    return service_pb2.ModelMetadataResponse(**model_metadata_json(name, versions, schema))


def server_metadata_json() -> dict[str, Any]:
    """What this server is, as the HTTP face tells it."""
    return {"name": SERVER, "version": __version__, "extensions": EXTENSIONS}


def server_metadata_message() -> service_pb2.ServerMetadataResponse:
    """The same, as the gRPC face tells it."""
    return service_pb2.ServerMetadataResponse(**server_metadata_json())


def _spec_json(spec: ColumnSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatypes[0], "shape": list(spec.shape)}


# --- checks of either face


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
        raise RequestError(f"the input {name!r} stands twice in the request")
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
    """The elements, if the shape is theirs."""
    if shape != [elements.size]:
        sizes = [_short(size) for size in shape[:8]] if isinstance(shape, list) else _short(shape)
        raise RequestError(
            f"{name} has {elements.size} elements; its shape is {sizes}, "
            f"and [{elements.size}] is allowed"
        )
    return elements


def _short(value: Any) -> Any:
    """A number or the start of a text; of anything else, which may be large or deep, the type."""
    if isinstance(value, str):
        return value[:MAX_NAME]
    is_small = type(value) is int and abs(value) < 2**64
    return value if is_small else type(value).__name__


# --- buffers, which both faces have


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


def _end_of_field(message: bytes, place: int) -> int:
    """Where the field of a message that begins here ends."""
    tag, place = _varint(message, place)
    kind = tag & 7
    if kind == VARINT:
        return _varint(message, place)[1]
    if kind == LENGTH_DELIMITED:
        length, place = _varint(message, place)
        return place + length
    if kind not in FIXED_BYTES:
        raise RequestError(f"the bytes are no ModelInferRequest: a field has wire type {kind}")
    return place + FIXED_BYTES[kind]


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while place < len(message) and shift < 64:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            break
    return value, place


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
        # A number beyond FP32 becomes infinity, which no column takes.
        with np.errstate(over="ignore"):
            return np.array(elements, dtype=DTYPE_BY_DATATYPE[datatype])
    except OverflowError as error:
        raise RequestError(f"{name}.data holds an integer that is too large: {datatype}") from error


def _names(types: set[type]) -> str:
    return " or ".join(sorted(one.__name__ for one in types))


def _binary_size(name: str, tensor: Mapping[str, Any], left: int) -> int | None:
    """How many of the bytes behind the JSON are this input's; None if its data are in the JSON."""
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
