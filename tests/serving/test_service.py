"""What the server does besides scoring: parity checks, logs, tokens, TLS, draining."""

import gc
import json
import logging
import ssl
import threading
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import URLError

import grpc
import pytest
import tritonclient.grpc as grpc_client
from tritonclient.utils import InferenceServerException

from tests.cache.servers import make_certificates, wait_until
from tests.serving.servers import Asked, EagerLoader, local_server, running_server
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

RawRequest = dict[str, Any]
WAIT_S = 60.0  # a busy machine
UNCACHED = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)


def asks(user: str, num_events: int = 6) -> RawRequest:
    return draw_raw(num_events, 2, ord(user)) | {"user_id": user, "request_id": user}


def state_of(server: Asked) -> Any:
    return server.ask("GET", "/v1/state")[1]


def test_cached_answers_are_checked_in_idle_time() -> None:
    with local_server(EagerLoader(), shadow_share=1.0) as server:
        for _ in range(3):
            server.rank(asks("a"))
        wait_until(
            lambda: state_of(server)["parity"]["checks"] == 2, WAIT_S
        )  # the first was no hit
        parity = state_of(server)["parity"]
        assert parity["drift"] < 2e-6
        assert not parity["alarm"]
        assert (
            'kvshare_parity_checks_total{model="kvshare"} 2.0' in server.ask("GET", "/metrics")[1]
        )


def test_beyond_the_limit_the_cache_is_switched_off_and_the_alarm_is_set() -> None:
    loader = EagerLoader()
    with local_server(loader, shadow_share=1.0) as server:
        server.rank(asks("a"))
        store = loader.engines[0].store
        assert store is not None
        store.caches[0].pool.kv_pages.add_(0.5)  # as if the store were corrupt
        wrong = server.rank(asks("a"))[1]
        assert wrong["cache"]["status"] == "hit"
        wait_until(lambda: state_of(server)["parity"]["alarm"], WAIT_S)
        right = server.rank(asks("a"))[1]
        assert (right["cache"]["status"], right["cache"]["reason"]) == ("bypass", "drift")
        [expected] = UNCACHED.rank(parse_all([asks("a")]))
        assert right["scores"] == pytest.approx(expected.scores, rel=0, abs=2e-6)
        assert 'kvshare_parity_alarm{model="kvshare"} 1.0' in server.ask("GET", "/metrics")[1]


def test_nothing_is_checked_if_the_share_is_zero() -> None:
    with local_server(EagerLoader(), shadow_share=0.0) as server:
        for _ in range(3):
            server.rank(asks("a"))
        assert state_of(server)["parity"]["checks"] == 0


def test_every_request_is_logged_with_its_id(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "torchrec_kvshare.requests"),
        local_server(EagerLoader()) as server,
    ):
        server.rank(asks("a"))
        server.rank({"user_id": 1}, **{"X-Request-Id": "mine"})
    good, bad = (vars(record) for record in caplog.records if record.name.endswith("requests"))
    assert (good["request_id"], good["outcome"], good["candidates"]) == ("a", "ok", 2)
    assert good["cache"]["status"] == "miss"
    assert good["ms"] >= good["score_ms"] > 0.0
    assert (bad["request_id"], bad["outcome"]) == ("mine", "invalid")
    assert "has no 'time'" in bad["error"]


def test_columns_that_no_model_reads_are_not_kept() -> None:
    """Whole requests were remembered: 8 MiB in columns that no model reads took 200 MiB."""
    with local_server(EagerLoader(), timeout_ms=60_000.0) as server:
        server.rank(asks("a"))
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(24):
                raw = asks("a") | {"user_id": f"user {number}", "more": [[]] * 2**15}
                assert server.rank(raw)[0] == 200
            raw = {}
            gc.collect()
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert held_bytes < 4 * 2**20


def test_no_message_of_an_error_is_longer_than_it_may_be(caplog: pytest.LogCaptureFixture) -> None:
    """The whole name of an unknown model was in the answer and in the log."""
    with caplog.at_level(logging.INFO), local_server(EagerLoader()) as server:
        name = "x" * 7_000
        status, refusal = server.ask("POST", f"/v1/rank?model={name}", asks("a"))
        assert (status, len(refusal["error"]["message"]) < 500) == (404, True)
        with grpc_client.InferenceServerClient(server.grpc_url) as client:
            with pytest.raises(InferenceServerException) as refused:
                client.infer("x" * 2**20, [])
            assert len(str(refused.value)) < 500
        assert len(server.rank(asks("a") | {"user_id": "x" * 2**20})[1]["error"]["message"]) < 500
    assert all(len(str(vars(record).get("error", ""))) < 500 for record in caplog.records)


def test_an_unknown_model_name_makes_no_series_of_its_own() -> None:
    with local_server(EagerLoader()) as server:
        for number in range(3):
            server.rank(asks("a") | {"n": number}, **{"X-Request-Id": f"{number}"})
            server.ask("POST", f"/v1/rank?model=made-up-{number}", asks("a"))
        text = server.ask("GET", "/metrics")[1]
    assert "made-up" not in text
    assert 'outcome="unknown_model"' in text


def test_a_token_is_needed_over_http_and_grpc(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("open sesame\n")
    with local_server(EagerLoader(), token_file=str(secret)) as server:
        said = {"Authorization": "Bearer open sesame"}
        for path in ("/v1/state", "/metrics", "/v2/models/kvshare"):
            assert server.ask("GET", path)[0] == 401
            assert server.ask("GET", path, headers={"Authorization": "Bearer open"})[0] == 401
            assert server.ask("GET", path, headers=said)[0] == 200
        assert server.rank(asks("a"))[0] == 401
        assert server.rank(asks("a"), **said)[0] == 200
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert server.ask("GET", path)[0] == 200
        with grpc_client.InferenceServerClient(server.grpc_url) as client:
            with pytest.raises(InferenceServerException) as refused:
                client.get_model_metadata("kvshare")
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
            with pytest.raises(InferenceServerException, match="bearer token"):
                client.is_server_live()
            headers = {"authorization": "Bearer open sesame"}
            assert client.is_model_ready("kvshare", headers=headers)


def test_http_and_grpc_speak_tls(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    settings = {"tls_cert_file": str(files.cert), "tls_key_file": str(files.key)}
    with local_server(EagerLoader(), **settings) as server:
        trusting = ssl.create_default_context(cafile=str(files.ca))
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", context=trusting) as got:
            assert got.status == 200
        plain = server.http_url.replace("https:", "http:")
        with pytest.raises((URLError, ConnectionError)):
            urllib.request.urlopen(f"{plain}/v2/health/ready").close()
        credentials = grpc.ssl_channel_credentials(files.ca.read_bytes())
        with grpc_client.InferenceServerClient(
            server.grpc_url, ssl=True, creds=credentials
        ) as client:
            assert client.is_server_ready()


def test_clients_without_a_certificate_are_turned_away_where_one_is_asked_for(
    tmp_path: Path,
) -> None:
    files = make_certificates(tmp_path)
    settings = {"tls_cert_file": str(files.cert), "tls_key_file": str(files.key)}
    with local_server(EagerLoader(), tls_client_ca_file=str(files.ca), **settings) as server:
        ca = files.ca.read_bytes()
        known = (files.key.read_bytes(), files.cert.read_bytes())
        for pair, is_welcome in (((None, None), False), (known, True)):
            credentials = grpc.ssl_channel_credentials(ca, *pair)
            with grpc.secure_channel(server.grpc_url, credentials) as channel:
                ready = grpc.channel_ready_future(channel)
                if is_welcome:
                    ready.result(30.0)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(1.0)
                    ready.cancel()
        context = ssl.create_default_context(cafile=str(files.ca))
        url = f"{server.http_url}/v2/health/ready"
        with pytest.raises((URLError, ssl.SSLError, ConnectionError)):
            urllib.request.urlopen(url, context=context).close()
        context.load_cert_chain(files.cert, files.key)
        with urllib.request.urlopen(url, context=context) as got:
            assert got.status == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert_file": "cert.pem"}, "both or none are needed"),
        ({"tls_client_ca_file": "ca.pem"}, "needs server.tls_cert_file"),
        ({"token_file": "nowhere"}, "'nowhere', which cannot be read"),
        ({"tls_cert_file": "no.pem", "tls_key_file": "no.key"}, "cannot be used"),
    ],
    ids=["key", "authority", "token", "files"],
)
def test_a_config_that_cannot_work_is_refused_before_anything_listens(
    settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), local_server(EagerLoader(), **settings):
        pass


def test_a_port_that_is_taken_is_an_error() -> None:
    with local_server(EagerLoader()) as server:
        port = int(server.http_address.rpartition(":")[2])
        grpc_port = int(server.grpc_url.rpartition(":")[2])
        for taken in ({"http_port": port}, {"grpc_port": grpc_port}):
            with (
                pytest.raises(ConfigError, match=r"server\.\w+_port"),
                local_server(EagerLoader(), **taken),
            ):
                pass


def test_sigterm_under_load_loses_no_accepted_request(artifact: Path) -> None:
    """Accepted requests are answered; later connections are refused."""
    raws = [asks(user, 9) for user in "abcdefgh"]
    expected = [answer.scores for answer in UNCACHED.rank(parse_all(raws))]
    outcomes: list[str] = []
    settings = ["server.timeout_ms=60000", "server.max_wait_ms=5"]
    with running_server(f"artifact={artifact}", *settings) as server:
        address, stop = server.http_address, threading.Event()

        def ask(index: int) -> None:
            while not stop.is_set():
                connection = HTTPConnection(address, timeout=60.0)
                try:
                    connection.connect()
                except OSError:
                    outcomes.append("refused")
                    return
                try:
                    connection.request("POST", "/v1/rank", json.dumps(raws[index]))
                    response = connection.getresponse()
                    answer = json.loads(response.read())
                except OSError:
                    # Accepted by the kernel only: the server never read it.
                    outcomes.append("unread")
                    return
                finally:
                    connection.close()
                assert response.status == 200, answer
                assert answer["scores"] == pytest.approx(expected[index], rel=0, abs=2e-6)
                outcomes.append("ok")

        with ThreadPoolExecutor(len(raws)) as threads:
            asking = [threads.submit(ask, index) for index in range(len(raws))]
            wait_until(
                lambda: outcomes.count("ok") > 30 or any(one.done() for one in asking), WAIT_S
            )
            assert server.stop() == 0
            stop.set()
            for one in asking:
                one.result()
        answered = outcomes.count("ok")
        served = [log for log in server.logs if log.get("outcome") == "ok"]
        assert len(served) == answered
        assert not [log for log in server.logs if log.get("level") == "ERROR"]
