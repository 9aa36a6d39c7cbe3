"""Messages of the Open Inference Protocol, as Triton's own client writes and reads them."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request

import torchrec_kvshare
from tests.worlds import SCHEMA, draw_raw, draw_raws, ragged_users
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features.decode import decode_request
from torchrec_kvshare.serving.columns import column_specs, column_tensors, datatype_of
from torchrec_kvshare.serving.oip import (
    decode_infer,
    decode_infer_json,
    encode_infer,
    encode_infer_json,
    model_metadata,
    requested_outputs_json,
    requested_report,
    requested_report_json,
    server_metadata,
)

Tensors = dict[str, NDArray[Any]]
Head = dict[str, Any]

TENSORS: Tensors = {
    "user_id": np.array([b"a", b"", b"\xff\0"], dtype=object),
    "time": np.array([2**63 - 1, -(2**63)]),
    "candidates.price.values": np.array([0.1, 1e300, -0.0, 5e-324]),
    "candidates.price.lengths": np.array([], dtype=np.int64),
    "context.country.values": np.array([], dtype=object),
    "float": np.array([0.1, 3e38], dtype=np.float32),
    "history.action.values": np.array([True, False, True]),
}
OUTPUTS: Tensors = {
    "scores": np.array([0.1, 1 / 3, 1e-17, 1.0]),
    "scores.lengths": np.array([3, 0, 1]),
    "cache.status": np.array([b"hit", b"miss", "é".encode()], dtype=object),
    "cache.reason": np.array([b"", b"cold", b""], dtype=object),
    "cache.tier": np.array([b"pages", b"none", b"none"], dtype=object),
    "cache.cached_events": np.array([2, 0, 0]),
    "cache.computed_events": np.array([1, 2, 4]),
    "cache.staleness_s": np.array([0.1 + 0.2, 0.0, 0.0]),
}


def assert_same_tensors(tensors: Tensors, expected: Tensors) -> None:
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].tolist() == tensor.tolist(), name


def grpc_request(tensors: Tensors) -> service_pb2.ModelInferRequest:
    """The message that Triton's client sends."""
    inputs = []
    for name, tensor in tensors.items():
        inputs.append(triton_grpc.InferInput(name, list(tensor.shape), datatype_of(tensor)))
        inputs[-1].set_data_from_numpy(tensor)
    return _get_inference_request("kvshare", inputs, "", "r1", None, 0, False, False, 0, None, None)


def typed_request(tensors: Tensors) -> service_pb2.ModelInferRequest:
    """The same with typed contents, as clients of other servers send it."""
    fields = {"INT64": "int64", "BYTES": "bytes", "FP32": "fp32", "FP64": "fp64", "BOOL": "bool"}
    request = service_pb2.ModelInferRequest()
    for name, tensor in tensors.items():
        datatype = datatype_of(tensor)
        contents = {f"{fields[datatype]}_contents": tensor.tolist()}
        request.inputs.add(name=name, datatype=datatype, shape=tensor.shape, contents=contents)
    return request


def http_request(tensors: Tensors, binary: bool) -> tuple[Head, bytes]:
    """The body that Triton's client sends, in its two parts."""
    inputs = []
    for name, tensor in tensors.items():
        inputs.append(triton_http.InferInput(name, list(tensor.shape), datatype_of(tensor)))
        inputs[-1].set_data_from_numpy(tensor, binary_data=binary)
    body, size = triton_http.InferenceServerClient.generate_request_body(inputs)
    size = len(body) if size is None else size
    return decode_request(body[:size]), body[size:]


# --- there and back


@given(users=ragged_users)
def test_requests_arrive_by_http_and_grpc_as_sent(
    users: list[tuple[int, int, int]],
) -> None:
    tensors = column_tensors(draw_raws(users), SCHEMA)
    assert_same_tensors(decode_infer(grpc_request(tensors)), tensors)
    assert_same_tensors(decode_infer(typed_request(tensors)), tensors)
    for binary in (True, False):
        assert_same_tensors(decode_infer_json(*http_request(tensors, binary)), tensors)


def test_every_datatype_arrives_at_its_extremes() -> None:
    assert_same_tensors(decode_infer(grpc_request(TENSORS)), TENSORS)
    assert_same_tensors(decode_infer(typed_request(TENSORS)), TENSORS)
    assert_same_tensors(decode_infer_json(*http_request(TENSORS, True)), TENSORS)
    texts = TENSORS | {"user_id": np.array(["é".encode(), b"", b"\0"], dtype=object)}
    assert_same_tensors(decode_infer_json(*http_request(texts, False)), texts)


def test_one_http_message_has_data_in_json_and_behind_it() -> None:
    head = {"inputs": [json_input(), binary_input("INT64", 1, 8), json_input(name="last")]}
    tensors = decode_infer_json(head, (7).to_bytes(8, "little"))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "time": [5, 6],
        "binary": [7],
        "last": [5, 6],
    }


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_integers_are_floats_in_json(datatype: str) -> None:
    head = {"inputs": [json_input(datatype=datatype, data=[1, 2.5])]}
    (tensor,) = decode_infer_json(head, b"").values()
    assert (datatype_of(tensor), tensor.tolist()) == (datatype, [1.0, 2.5])


def test_nulls_of_other_clients_count_as_missing() -> None:
    tensor = json_input() | {"parameters": None}
    head = {"id": None, "parameters": None, "outputs": None, "inputs": [tensor]}
    assert decode_infer_json(head, b"")["time"].tolist() == [5, 6]
    assert list(requested_outputs_json(head, SCHEMA)) == list(OUTPUTS)


# --- answers


@pytest.mark.parametrize("requested", [[], ["cache.status", "scores", "scores"]])
def test_grpc_answers_are_read_by_tritons_client(requested: list[str]) -> None:
    response = encode_infer("kvshare", "ab-cd", "r1", OUTPUTS, requested)
    assert (response.model_name, response.model_version, response.id) == ("kvshare", "ab-cd", "r1")
    names = list(dict.fromkeys(requested)) or list(OUTPUTS)
    result = triton_grpc.InferResult(response)
    read = {output.name: result.as_numpy(output.name) for output in response.outputs}
    assert_same_tensors(read, {name: OUTPUTS[name] for name in names})


def test_a_grpc_output_that_does_not_exist_is_refused_by_its_name() -> None:
    with pytest.raises(RequestError, match=r"^score is no output; the outputs are \['scores', "):
        encode_infer("kvshare", "ab-cd", "", OUTPUTS, ["scores", "score"])


def output(name: str, **parameters: Any) -> Head:
    return {"name": name, "parameters": parameters}


# What a message asks for, and which outputs it is answered with as binary data and in JSON.
ASKED: dict[str, tuple[Head, list[str], list[str]]] = {
    "nothing": ({}, [], list(OUTPUTS)),
    "all binary": ({"parameters": {"binary_data_output": True}}, list(OUTPUTS), []),
    "some": ({"outputs": [{"name": "scores"}]}, [], ["scores"]),
    "both": (
        {"outputs": [output("cache.tier"), output("scores", binary_data=True)]},
        ["scores"],
        ["cache.tier"],
    ),
    "all but one binary": (
        {
            "parameters": {"binary_data_output": True},
            "outputs": [output("cache.status"), output("scores", binary_data=False)],
        },
        ["cache.status"],
        ["scores"],
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_http_answers_are_read_by_tritons_client(case: str) -> None:
    head, binary, plain = ASKED[case]
    wanted = requested_outputs_json(head, SCHEMA)
    assert {name for name, is_binary in wanted.items() if is_binary} == set(binary)
    body, size = encode_infer_json("kvshare", "ab-cd", "r1", OUTPUTS, wanted)
    assert (size is None) == (not binary)
    answer = json.loads(body[:size])
    assert answer["model_name"] == "kvshare"
    assert (answer["model_version"], answer["id"]) == ("ab-cd", "r1")
    assert {one["name"] for one in answer["outputs"] if "data" in one} == set(plain)
    result = triton_http.InferenceServerClient.parse_response_body(body, header_length=size)
    for name in (*binary, *plain):
        # In JSON texts are text, and the client leaves them so.
        texts = [one.decode() if isinstance(one, bytes) else one for one in OUTPUTS[name].tolist()]
        expected = texts if name in plain else OUTPUTS[name].tolist()
        assert result.as_numpy(name).tolist() == expected


def test_a_report_is_requested_by_a_parameter_over_http_and_grpc() -> None:
    message = service_pb2.ModelInferRequest()
    assert requested_report(message) == requested_report_json({}) == []
    message.parameters["report"].string_param = "unknown_ids"
    head = {"parameters": {"report": "unknown_ids"}}
    assert requested_report(message) == requested_report_json(head) == ["unknown_ids"]
    assert list(requested_outputs_json(head, SCHEMA)) == [*OUTPUTS, "unknown_ids"]
    message.parameters["report"].string_param = "scores"
    with pytest.raises(RequestError, match=r"parameter report is scores; one of \['unknown_ids'\]"):
        requested_report(message)
    with pytest.raises(RequestError, match="parameter report is list"):
        requested_report_json({"parameters": {"report": ["unknown_ids"]}})


def test_an_answer_to_a_request_without_an_id_has_none() -> None:
    body, _ = encode_infer_json("kvshare", "ab-cd", "", OUTPUTS, {"scores": False})
    assert "id" not in json.loads(body)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"outputs": [{"name": "score"}]}, "score is no output; the outputs are"),
        ({"outputs": [{"name": ["scores"]}]}, "list is no output"),
        ({"outputs": [{}]}, "NoneType is no output"),
        ({"outputs": ["scores"]}, "outputs is list; a list of objects is allowed"),
        ({"outputs": {}}, "outputs is dict; a list of objects"),
        ({"outputs": [output("scores", binary_data=1)]}, "binary_data of the output scores is 1"),
        ({"parameters": {"binary_data_output": "true"}}, "binary_data_output of the request is tr"),
        ({"parameters": []}, "parameters of the request are list"),
    ],
    ids=["unknown", "list", "unnamed", "text", "object", "flag", "text flag", "parameters"],
)
def test_broken_outputs_are_refused_by_their_names(head: Head, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        requested_outputs_json(head, SCHEMA)


# --- malformed gRPC


def grpc_input(datatype: str, shape: list[int], buffer: bytes) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(raw_input_contents=[buffer])
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request


def typed_input(shape: list[int], datatype: str = "INT64", **contents: Any) -> Any:
    request = service_pb2.ModelInferRequest()
    request.inputs.add(name="x", datatype=datatype, shape=shape, contents=contents)
    return request


def twice() -> service_pb2.ModelInferRequest:
    request = typed_input([1], int64_contents=[1])
    request.inputs.append(request.inputs[0])
    return request


def both() -> service_pb2.ModelInferRequest:
    request = typed_input([1], int64_contents=[1])
    request.raw_input_contents.append(bytes(8))
    return request


def more_buffers() -> service_pb2.ModelInferRequest:
    request = grpc_input("INT64", [1], bytes(8))
    request.raw_input_contents.append(bytes(8))
    return request


def renamed(name: str) -> service_pb2.ModelInferRequest:
    request = typed_input([0])
    request.inputs[0].name = name
    return request


HUGE = 2**62
BROKEN_GRPC: dict[str, tuple[service_pb2.ModelInferRequest, str]] = {
    "negative": (grpc_input("INT64", [-1], b""), r"^x has 0 elements; its shape is \[-1\]"),
    "huge": (grpc_input("INT64", [HUGE], bytes(8)), r"^x has 1 elements; its shape is \[46116"),
    "overflow": (grpc_input("INT64", [HUGE, 4], b""), r"^x has 0 elements; its shape is \[46.*, 4"),
    "huge without data": (typed_input([HUGE]), "^x has 0 elements; its shape is"),
    "matrix": (grpc_input("INT64", [1, 2], bytes(16)), r"its shape is \[1, 2\], and \[2\] is all"),
    "no shape": (grpc_input("INT64", [], bytes(8)), r"its shape is \[\], and \[1\] is allowed"),
    "many dimensions": (grpc_input("INT64", [1] * 999, bytes(8)), r"its shape is \[(1, ){7}1\]"),
    "too few": (typed_input([2], int64_contents=[1]), "^x has 1 elements; its shape is"),
    "twice": (twice(), "the input 'x' appears twice"),
    "long name": (renamed("n" * 201), "an input's name is 201 characters; a text of 200"),
    "buffers": (more_buffers(), "raw_input_contents has 2 entries; the request has 1 inputs"),
    "both": (both(), "^x has both contents and raw_input_contents"),
    "datatype": (grpc_input("INT32", [1], bytes(4)), r"^x is of datatype INT32; one of \['INT64'"),
    "long datatype": (
        grpc_input("I" * 999, [1], bytes(4)),
        r"^x is of datatype I{200}\.\.\.; one",
    ),
    "other contents": (
        typed_input([1], int_contents=[1]),
        r"^x has data in \['int_contents'\]; INT64 has them in int64_contents",
    ),
    "more contents": (typed_input([1], int64_contents=[1], fp64_contents=[1.0]), "^x has data in"),
    "part of a number": (grpc_input("FP64", [1], bytes(9)), "^x has 9 bytes of data; an element"),
    "more numbers": (grpc_input("FP32", [1], bytes(8)), "^x has 2 elements; its shape is"),
    "part of a length": (grpc_input("BYTES", [1], b"\0\0"), "^x has 2 bytes of data; its last ele"),
    "part of a text": (grpc_input("BYTES", [1], b"\2\0\0\0a"), "would end at byte 6"),
    "endless text": (grpc_input("BYTES", [1], b"\xff" * 5), "would end at byte 4294967299"),
    "trailing": (grpc_input("BYTES", [1], b"\1\0\0\0ab"), "^x has 6 bytes of data"),
    "more texts": (grpc_input("BYTES", [1], bytes(8)), "^x has 2 elements; its shape is"),
}


@pytest.mark.parametrize("case", BROKEN_GRPC)
def test_a_broken_grpc_message_is_refused_by_its_tensor(case: str) -> None:
    request, message = BROKEN_GRPC[case]
    with pytest.raises(RequestError, match=message):
        decode_infer(request)


# --- malformed JSON


def json_input(**changes: Any) -> Head:
    return {"name": "time", "datatype": "INT64", "shape": [2], "data": [5, 6]} | changes


def binary_input(datatype: str, num_elements: Any, size: Any) -> Head:
    tensor = {"name": "binary", "datatype": datatype, "shape": [num_elements]}
    return tensor | {"parameters": {"binary_data_size": size}}


def json_data(datatype: str, *data: Any) -> Head:
    return json_input(datatype=datatype, data=list(data), shape=[len(data)])


BROKEN_JSON: dict[str, tuple[Any, bytes, str]] = {
    "inputs": ({}, b"", "^inputs is dict; a list of objects is allowed"),
    "texts": (["time"], b"", "^inputs is list; a list of objects"),
    "unnamed": ([{}], b"", "an input's name is NoneType; a text of"),
    "name": ([json_input(name=["time"])], b"", "an input's name is list"),
    "twice": ([json_input(), json_input()], b"", "the input 'time' appears twice"),
    "datatype": ([json_input(datatype="BF16")], b"", "^time is of datatype BF16; one of"),
    "list datatype": ([json_input(datatype=[])], b"", "^time is of datatype list; one of"),
    "shape": ([json_input(shape=[3])], b"", r"^time has 2 elements; its shape is \[3\]"),
    "no shape": ([json_input(shape=None)], b"", "^time has 2 elements; its shape is NoneType"),
    "odd shape": ([json_input(shape=[[2], "2", 2**99])], b"", r"is \['list', '2', 'int'\]"),
    "no data": ([json_input(data=None)], b"", "^time has data or binary_data_size; one of them"),
    "both": ([binary_input("INT64", 1, 8) | {"data": [1]}], bytes(8), "^binary has data or bin"),
    "nested": ([json_data("INT64", [5], [6])], b"", "^time.data holds list; int is allowed"),
    "text data": ([json_input(data="56")], b"", "^time.data is str; a flat list is allowed"),
    "bools": ([json_data("INT64", True, 6)], b"", "^time.data holds bool; int is allowed in INT"),
    "floats": ([json_data("INT64", 5.0)], b"", "^time.data holds float; int is allowed"),
    "nulls": ([json_data("BYTES", None)], b"", "^time.data holds NoneType; str is allowed"),
    "integers": ([json_data("BYTES", 7)], b"", "^time.data holds int; str is allowed in BYTES"),
    "texts in floats": ([json_data("FP64", "1")], b"", "holds str; float or int is allowed"),
    "beyond 64 bits": ([json_data("INT64", 2**63)], b"", "^time.data holds an integer that is too"),
    "beyond floats": ([json_data("FP32", 10**400)], b"", "^time.data holds an integer that is too"),
    "lone surrogate": ([json_data("BYTES", "a\ud800")], b"", r"^time holds '\\ud800'"),
    "parameters": ([json_input(parameters=[])], b"", "parameters of time are list"),
    "bytes": ([binary_input("INT64", 1, 9)], bytes(8), "binary_data_size of 9; 0 to 8 bytes are"),
    "negative": ([binary_input("INT64", 1, -1)], bytes(8), "^binary has a binary_data_size of -1"),
    "true bytes": ([binary_input("INT64", 1, True)], bytes(8), "a binary_data_size of bool"),
    "few bytes": ([binary_input("INT64", 1, 4)], bytes(4), "^binary has 4 bytes of data; an elem"),
    "left bytes": ([binary_input("INT64", 1, 8)], bytes(9), "^9 bytes follow the JSON; its inputs"),
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_a_broken_http_message_is_refused_by_its_tensor(case: str) -> None:
    inputs, binary, message = BROKEN_JSON[case]
    with pytest.raises(RequestError, match=message):
        decode_infer_json({"inputs": inputs}, binary)


def test_numbers_beyond_fp32_are_infinite() -> None:
    tensors = decode_infer_json({"inputs": [json_data("FP32", 1e300, -1e300)]}, b"")
    assert tensors["time"].tolist() == [np.inf, -np.inf]


# --- anything

GOOD = column_tensors([draw_raw(5, 3, seed=2)], SCHEMA)
GOOD_BYTES = grpc_request(GOOD).SerializeToString()
TYPED_BYTES = typed_request(GOOD).SerializeToString()
edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=4)


def edited(message: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(message)
    for place, byte in changes:
        changed[place % len(changed)] = byte
    return bytes(changed)


@given(message=st.sampled_from([GOOD_BYTES, TYPED_BYTES]), changes=edits)
def test_any_grpc_message_is_read_or_refused(
    message: bytes, changes: list[tuple[int, int]]
) -> None:
    request = service_pb2.ModelInferRequest()
    try:
        request.ParseFromString(edited(message, changes))
    except DecodeError:  # What is no message never arrives.
        return
    with suppress(RequestError):
        assert isinstance(decode_infer(request), dict)


@given(
    datatype=st.sampled_from(["INT64", "BYTES", "FP32"]), shape=st.integers(), buffer=st.binary()
)
def test_any_buffer_is_read_or_refused(datatype: str, shape: int, buffer: bytes) -> None:
    head = {"inputs": [binary_input(datatype, shape, len(buffer))]}
    with suppress(RequestError):
        assert decode_infer_json(head, buffer)["binary"].shape == (shape,)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("BYTES"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["name", "datatype", "shape", "data", "parameters"])


@given(
    changes=st.dictionaries(keys, json_values, max_size=2),
    parameters=st.dictionaries(st.just("binary_data_size"), json_values),
    others=st.dictionaries(st.sampled_from(["inputs", "outputs", "parameters"]), json_values),
    binary=st.binary(),
)
def test_any_http_message_is_read_or_refused(
    changes: Head, parameters: Head, others: Head, binary: bytes
) -> None:
    head = {"inputs": [json_input(parameters=parameters) | changes]} | others
    with suppress(RequestError):
        assert isinstance(decode_infer_json(head, binary), dict)
    with suppress(RequestError):
        assert isinstance(requested_outputs_json(head, SCHEMA), dict)


@pytest.mark.parametrize("key", ["name", "datatype", "shape", "data", "parameters"])
def test_values_as_deep_as_json_goes_are_refused(key: str) -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(RequestError):
        decode_infer_json({"inputs": [json_input(**{key: deep})]}, b"")


# --- metadata


def test_metadata_of_a_model_are_the_same_over_http_and_grpc() -> None:
    metadata = model_metadata("kvshare", ["1", "2"], SCHEMA)
    assert (metadata["name"], metadata["versions"]) == ("kvshare", ["1", "2"])
    assert [one["name"] for one in metadata["inputs"]] == [one.name for one in column_specs(SCHEMA)]
    assert metadata["inputs"][0] == {"name": "user_id", "datatype": "BYTES", "shape": [-1]}
    assert metadata["outputs"][0] == {"name": "scores", "datatype": "FP64", "shape": [-1]}
    message = service_pb2.ModelMetadataResponse(**metadata)
    for side in ("inputs", "outputs"):
        assert metadata[side] == [
            {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
            for one in getattr(message, side)
        ]
    assert (message.name, list(message.versions)) == ("kvshare", ["1", "2"])
    assert message.platform == metadata["platform"] == "torchrec_kvshare"


def test_metadata_of_the_server_are_the_same_over_http_and_grpc() -> None:
    metadata = server_metadata()
    assert metadata["version"] == torchrec_kvshare.__version__
    assert metadata["extensions"] == ["binary_tensor_data", "sequence"]
    message = service_pb2.ServerMetadataResponse(**metadata)
    assert metadata == {
        "name": message.name,
        "version": message.version,
        "extensions": list(message.extensions),
    }
    assert message.name == "torchrec_kvshare"
