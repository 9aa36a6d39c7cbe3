"""NaN in a model, over HTTP and gRPC: an error of its request alone, and never NaN in an answer."""

import asyncio
import gc
import json
import logging
import math
import queue
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.cache.servers import wait_until
from tests.nan_worlds import bad_candidates, bad_history, good_raw, poisoned_dlrm
from tests.serving.servers import Asked, EagerLoader, inputs_of, local_server
from tests.worlds import SCHEMA, parse_all
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import ScoreError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.columns import column_tensors
from torchrec_kvshare.serving.logs import log_as_json
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import Models
from torchrec_kvshare.serving.service import Call, Service
from torchrec_kvshare.serving.shadow import ShadowParity

RawRequest = dict[str, Any]
LONG = 40  # candidates: more than half of a step, so that they are scored in parts


class PoisonedLoader(EagerLoader):
    """Engines whose model gives NaN for one item."""

    def load(self, folder: Path) -> Engine:
        engine = super().load(folder)
        engine.model = RankingModel(poisoned_dlrm(int(folder.name))).eval()
        return engine


@pytest.fixture
def server() -> Iterator[Asked]:
    settings = {"timeout_ms": 60_000.0, "stream_timeout_s": 60.0, "shadow_share": 1.0}
    with local_server(PoisonedLoader(), batch_candidates=32, **settings) as asked:
        yield asked
        # The state is always valid JSON, and nothing counts as an error of the server.
        status, state = ask_strictly(asked, "/v1/state")
        assert status == 200
        assert state["requests"]["internal"] == 0
        assert not state["parity"]["alarm"]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is in the JSON")


def ask_strictly(server: Asked, path: str, body: Any = None) -> tuple[int, Any]:
    """As ``Asked.ask``, where NaN is no JSON."""
    connection = HTTPConnection(server.http_address, timeout=60.0)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text)
        response = connection.getresponse()
        return response.status, json.loads(response.read(), parse_constant=refuse_constant)
    finally:
        connection.close()


def count_of(server: Asked, series: str) -> float:
    text = server.ask("GET", "/metrics")[1]
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(series))


@pytest.mark.parametrize("raw", [bad_candidates("b", 3, 2), bad_history("b", 3)])
def test_one_request_is_an_error_with_its_name(server: Asked, raw: RawRequest) -> None:
    """It was an error inside the server that named nothing."""
    for _ in range(2):
        status, answer = ask_strictly(server, "/v1/rank", raw)
        assert (status, answer["request_id"]) == (500, "b")
        assert answer["error"]["type"] == "ScoreError"
        assert "of request b" in answer["error"]["message"]
    name = 'kvshare_requests_total{model="kvshare",outcome="not_finite",server="http"}'
    assert count_of(server, name) == 2
    assert count_of(server, "kvshare_not_finite_scores_total") == 2
    assert ask_strictly(server, "/v1/rank", good_raw("a", 2))[0] == 200


def test_in_a_list_the_others_are_answered(server: Asked) -> None:
    """One NaN was status 500 for the whole list."""
    raws = [
        good_raw("a", 2),
        bad_candidates("b", 3, 0),
        bad_candidates("c", LONG, LONG - 1),
        bad_history("d", 2),
        good_raw("e", 5),
    ]
    status, answers = ask_strictly(server, "/v1/rank", raws)
    assert status == 200
    assert [len(answers[place]["scores"]) for place in (0, 4)] == [2, 5]
    errors = [answers[place]["error"] for place in (1, 2, 3)]
    assert {error["type"] for error in errors} == {"ScoreError"}
    assert f"candidates {LONG - 1} of request c" in errors[1]["message"]
    assert count_of(server, "kvshare_not_finite_scores_total") == 3
    assert count_of(server, "kvshare_cache_not_finite_total") >= 1


def test_the_open_protocol_refuses_over_http_and_grpc(server: Asked) -> None:
    """Over gRPC a NaN was an answer, and counted as ok."""
    raws = [good_raw("a", 2), bad_candidates("b", 3, 1)]
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="candidates 1 of request") as failed:
            client.infer("kvshare", inputs_of(grpc_client, column_tensors(raws, SCHEMA)))
        assert failed.value.status() == "StatusCode.INTERNAL"
        good = client.infer("kvshare", inputs_of(grpc_client, column_tensors(raws[:1], SCHEMA)))
        assert np.isfinite(good.as_numpy("scores")).all()
    with http_client.InferenceServerClient(server.http_address, network_timeout=60.0) as client:
        with pytest.raises(InferenceServerException, match="candidates 1 of request") as failed:
            client.infer("kvshare", inputs_of(http_client, column_tensors(raws, SCHEMA)))
        assert failed.value.status() == "500"
    for kind in ("grpc", "http"):
        labels = f'model="kvshare",outcome="not_finite",server="{kind}"'
        assert count_of(server, f"kvshare_requests_total{{{labels}}}") == 1


def test_a_group_of_events_gets_its_error_and_the_stream_goes_on(server: Asked) -> None:
    raw = bad_candidates("a", 8, 3)
    columns = raw["candidates"]
    groups = [
        {"candidates": {name: cells[first : first + 2] for name, cells in columns.items()}}
        for first in (0, 2, 4, 6)
    ]
    lines = [raw | groups[0], *groups[1:]]
    body = "".join(json.dumps(line) + "\n" for line in lines).encode()
    status, text = server.ask("POST", "/v1/rank?stream=1", body)
    assert status == 200
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == ["scores", "error", "scores", "scores", "end"]
    data = json.loads(events[1][1].removeprefix("data: "), parse_constant=refuse_constant)
    assert (data["first_candidate"], data["error"]["type"]) == (2, "ScoreError")
    assert "candidates 3 of request a" in data["error"]["message"]
    assert json.loads(events[2][1].removeprefix("data: "))["first_candidate"] == 4


def test_a_message_of_a_sequence_gets_its_error_and_the_stream_goes_on(server: Asked) -> None:
    raw = bad_candidates("a", 6, 2)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number, first in enumerate((0, 2, 4)):
            cut = {name: cells[first : first + 2] for name, cells in raw["candidates"].items()}
            inputs = inputs_of(grpc_client, column_tensors([raw | {"candidates": cut}], SCHEMA))
            if number:
                inputs = [one for one in inputs if one.name().startswith("candidates.")]
            client.async_stream_infer(
                "kvshare",
                inputs,
                request_id=f"m{number}",
                sequence_id="s",
                sequence_start=number == 0,
                sequence_end=number == 2,
            )
        alone = inputs_of(grpc_client, column_tensors([bad_candidates("b", 3, 0)], SCHEMA))
        client.async_stream_infer("kvshare", alone, request_id="alone")
        got = [answers.get(timeout=60) for _ in range(4)]
        client.stop_stream()
    assert [error is None for _, error in got] == [True, False, True, False]
    assert "ScoreError" in str(got[1][1])
    assert "ScoreError" in str(got[3][1])
    assert np.isfinite(got[2][0].as_numpy("scores")).all()


def test_nan_as_a_number_of_a_tensor_is_refused(server: Asked) -> None:
    tensors = column_tensors([good_raw("a", 2)], SCHEMA)
    tensors["candidates.price.values"] = np.array([np.nan, 1.0], dtype=np.float32)
    for kit, address in ((grpc_client, server.grpc_url), (http_client, server.http_address)):
        with (
            kit.InferenceServerClient(address) as client,
            pytest.raises(InferenceServerException, match=r"price holds nan") as refused,
        ):
            client.infer("kvshare", inputs_of(kit, tensors))
        assert refused.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")


def test_cached_kv_that_turned_nan_raises_the_alarm() -> None:
    """``nan > limit`` is false: nothing was said, and NaN stood in the state's JSON."""
    loader = EagerLoader()
    with local_server(loader, shadow_share=0.001) as server:
        raw = good_raw("a", 2)
        server.rank(raw)
        store = loader.engines[0].store
        assert store is not None
        store.caches[0].pool.kv_pages.fill_(torch.nan)  # as broken memory would
        status, wrong = ask_strictly(server, "/v1/rank", raw)
        assert (status, wrong["error"]["type"]) == (500, "ScoreError")
        wait_until(lambda: ask_strictly(server, "/v1/state")[1]["parity"]["alarm"], 60.0)
        assert ask_strictly(server, "/v1/state")[1]["parity"]["drift"] is None
        assert count_of(server, "kvshare_parity_drift") == math.inf
        status, right = ask_strictly(server, "/v1/rank", raw)
        assert status == 200
        assert (right["cache"]["status"], right["cache"]["reason"]) == ("bypass", "drift")


def test_a_cached_score_that_the_model_itself_does_not_give_is_far_off() -> None:
    healthy = EagerLoader().load(Path("1"))
    raw = bad_candidates("a", 2, 1)
    [request] = parse_all([raw])
    healthy.rank([request])
    [answer] = healthy.rank([request])
    assert answer.cache.status == "hit"
    shadow = ShadowParity(share=1.0, part_candidates=8)
    shadow.offer(PoisonedLoader().load(Path("1")), request, answer)
    checked = shadow.check()
    assert checked is not None
    assert checked[1] == math.inf


def test_a_group_that_fails_after_its_client_has_gone_is_no_lost_exception(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its client had gone: asyncio logged an error for each of its groups."""
    loader = PoisonedLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, num_hot=0, hot_bytes=0)
    models.publish("kvshare", "1", Path("1"))

    async def ask() -> int:
        service = Service(models, metrics, ServerConfig())
        call = Call(
            server="http",
            model=None,
            version=None,
            request_id="r",
            timeout_s=60.0,
            began_at=time.monotonic(),
        )
        raw = bad_candidates("a", 2, 0)
        with service.stream(call, models.get(), raw) as stream:
            groups = [stream.first(), stream.next({"candidates": raw["candidates"]})]
            reading = groups[0].parts()
            with pytest.raises(ScoreError):
                await anext(reading)
            while not groups[1].job.answer.done():
                await asyncio.sleep(0.01)
        service.close()
        return len(groups)

    assert asyncio.run(ask()) == 2
    gc.collect()
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_a_log_line_has_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    root, logger = logging.getLogger(), logging.getLogger("torchrec_kvshare.test")
    handlers = root.handlers[:]
    try:
        log_as_json()
        logger.error("odd", extra={"drift": math.nan, "by": {"a": [math.inf, 1.5]}})
    finally:
        root.handlers[:] = handlers
    line = json.loads(capsys.readouterr().err, parse_constant=refuse_constant)
    assert (line["message"], line["drift"], line["by"]) == ("odd", None, {"a": [None, 1.5]})
