"""A model of several tasks over every protocol: each task has scores of its own."""

import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client

from tests.serving.servers import Asked, EagerLoader, inputs_of, local_server
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine
from torchrec_kvshare.serving.columns import column_tensors
from torchrec_kvshare.serving.oip import model_metadata, requested_outputs_json
from torchrec_kvshare.serving.shadow import ShadowParity

TASKS = ("like", "love")
SCORES = ["scores.like", "scores.love"]
TWO_TASKS = replace(SCHEMA, tasks=TASKS)
UNCACHED = Engine(RankingModel(make_dlrm(1, TWO_TASKS)).eval(), TWO_TASKS, None)
RAW = draw_raw(9, 12, 5) | {"user_id": "user 1"}


@pytest.fixture(scope="module")
def server() -> Iterator[Asked]:
    # Parts of at most 4 candidates, so that longer requests are scored in several.
    limits = {"timeout_ms": 60_000.0, "stream_timeout_s": 60.0, "batch_candidates": 8}
    with local_server(EagerLoader(schema=TWO_TASKS), **limits) as asked:
        yield asked


def expected(raw: dict[str, Any]) -> dict[str, Any]:
    [answer] = UNCACHED.rank(parse_all([raw]))
    by_task = answer.scores_by_task.items()
    return {task: pytest.approx(scores, rel=0, abs=2e-6) for task, scores in by_task}


def test_answers_in_the_projects_format_are_by_task(server: Asked) -> None:
    short = draw_raw(3, 2, 6)
    for _ in range(2):
        status, answer = server.rank(RAW)
        assert (status, list(answer["scores"])) == (200, list(TASKS))
        assert answer["scores"] == expected(RAW)
    _, answers = server.rank([short, RAW])
    assert [one["scores"] for one in answers] == [expected(short), expected(RAW)]


def test_tritons_clients_get_a_tensor_for_each_task(server: Asked) -> None:
    raws = [RAW, draw_raw(3, 2, 6)]
    tensors = column_tensors(raws, TWO_TASKS)
    with (
        grpc_client.InferenceServerClient(server.grpc_url) as by_grpc,
        http_client.InferenceServerClient(server.http_address, network_timeout=60.0) as by_http,
    ):
        for kit, client in ((grpc_client, by_grpc), (http_client, by_http)):
            result = client.infer("kvshare", inputs_of(kit, tensors))
            assert result.as_numpy("scores") is None
            ends = np.cumsum(result.as_numpy("scores.lengths"))[:-1]
            for task in TASKS:
                parts = np.split(result.as_numpy(f"scores.{task}"), ends)
                for raw, scores in zip(raws, parts, strict=True):
                    assert scores.tolist() == expected(raw)[task]
        named = [one["name"] for one in by_http.get_model_metadata("kvshare")["outputs"]]
    assert named[:3] == [*SCORES, "scores.lengths"]


def test_a_stream_has_the_scores_of_each_task_in_parts(server: Asked) -> None:
    columns = RAW["candidates"]
    groups = [
        {"candidates": {name: cells[first:last] for name, cells in columns.items()}}
        for first, last in ((0, 5), (5, 12))
    ]
    lines = "".join(json.dumps(one) + "\n" for one in (RAW | groups[0], groups[1]))
    _, text = server.ask("POST", "/v1/rank?stream=1", lines.encode())
    parts = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")][:-1]
    assert [part["first_candidate"] for part in parts] == [0, 4, 5, 9]
    joined = {task: [s for part in parts for s in part["scores"][task]] for task in TASKS}
    assert joined == expected(RAW)

    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number, group in enumerate(groups):
            tensors = column_tensors([RAW | group], TWO_TASKS)
            if number:
                tensors = {n: v for n, v in tensors.items() if n.startswith("candidates.")}
            client.async_stream_infer(
                "kvshare",
                inputs_of(grpc_client, tensors),
                sequence_id="s",
                sequence_start=number == 0,
                sequence_end=number == 1,
            )
        got = [answers.get(timeout=60)[0] for _ in groups]
        client.stop_stream()
    for task in TASKS:
        scores = np.concatenate([one.as_numpy(f"scores.{task}") for one in got])
        assert scores.tolist() == expected(RAW)[task]


def test_only_outputs_of_the_models_tasks_can_be_asked_for() -> None:
    wanted = {"outputs": [{"name": "scores.love"}]}
    assert requested_outputs_json(wanted, TWO_TASKS) == {"scores.love": False}
    for name in ("scores", "scores.buy"):
        with pytest.raises(RequestError, match=rf"^{name} is no output; the outputs are"):
            requested_outputs_json({"outputs": [{"name": name}]}, TWO_TASKS)
    outputs = model_metadata("kvshare", ["1"], TWO_TASKS)["outputs"]
    assert [one["name"] for one in outputs][:2] == SCORES


@pytest.mark.parametrize("task", TASKS)
def test_a_shadow_check_compares_every_task(task: str) -> None:
    [request] = parse_all([RAW])
    [answer] = UNCACHED.rank([request])
    scores = {name: list(of_task) for name, of_task in answer.scores_by_task.items()}
    scores[task][7] += 0.25
    use = replace(answer.cache, status="hit", cached_events=9)
    shadow = ShadowParity(share=1.0, part_candidates=5)
    shadow.offer(UNCACHED, request, replace(answer, scores=scores, cache=use))
    checks = [shadow.check() for _ in range(3)]
    assert checks[:2] == [None, None]
    assert checks[2] is not None
    assert checks[2][1] == pytest.approx(0.25, abs=1e-5)


def test_an_answers_scores_are_a_list_without_a_name_and_a_mapping_with_names() -> None:
    [named] = UNCACHED.rank(parse_all([RAW]))
    assert isinstance(named, Answer)
    assert named.to_json()["scores"] == named.scores == named.scores_by_task
    assert named.ranking_scores == named.scores_by_task["like"]
    unnamed = replace(named, scores=[0.5])
    assert unnamed.to_json()["scores"] == [0.5] == unnamed.ranking_scores
    assert unnamed.scores_by_task == {"": [0.5]}
