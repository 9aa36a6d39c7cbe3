"""The C++ host answers as Python does, bit by bit, and no line crashes it.

A host takes half a second to start and, with a real model, four to warm it up: tests of requests
ask for all their cases in one start.
"""

import copy
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from tests.encoder_worlds import TWO_HISTORIES, schema_with
from tests.features.test_hashing import GOLDEN, NUM_ROWS, SALT
from tests.pipelines.commands import ROOT, run_pipeline
from tests.pipelines.test_score import broken_lines, changed, truncate, unusual_lines
from tests.worlds import SCHEMA, draw_raw, make_dlrm
from torchrec_kvshare.benchmark.scenarios.host import build_host
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.export.exporter import export_model
from torchrec_kvshare.export.torchscript import PROGRAM, load_program, script_model
from torchrec_kvshare.features.decode import decode_request
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.ids import canonical_id
from torchrec_kvshare.features.limits import MAX_ID_CHARACTERS
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    HASHED,
    HISTORY,
    ITEM,
    NUM_RESERVED_ROWS,
    USER,
    VOCABULARY,
    FeatureSchema,
    Hashed,
    History,
    IdMap,
    Vocabulary,
    Window,
    save_schema,
)
from torchrec_kvshare.features.tensors import USER_KEY, request_tensors, user_key
from torchrec_kvshare.model.quantised import quantise_tables
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine, answered_scores
from torchrec_kvshare.scoring.files import score_lines

FAILED, MISUSED, REFUSED = 1, 2, 3
RETAIL = ROOT.parent / "shared" / "data" / "uci-online-retail"
CAPACITY_BYTES, TTL_S = 256 * 2**20, 300.0  # the host's defaults
TOO_SHORT = ("bypass", "too_short")
ECHO_VERSION = "0123456789abcdef-fedcba9876543210"

Json = dict[str, Any]


def run_host(host: Path, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [host, *map(str, arguments)],
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_host(tmp_path_factory.mktemp("host"))


Ask = Callable[..., list[Json]]


@pytest.fixture
def ask(host: Path, tmp_path: Path) -> Ask:
    """Return a function that asks the host for answers to lines."""

    def answers(artifact: Path, lines: Sequence[bytes], *options: Any) -> list[Json]:
        requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
        requests.write_bytes(b"".join(line + b"\n" for line in lines))
        done = run_host(host, artifact, requests, output, *options)
        assert done.returncode in (0, REFUSED), done.stderr
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert done.returncode == (REFUSED if any("error" in one for one in found) else 0)
        assert not list(tmp_path.glob(".*"))
        return found

    return answers


class Python:
    """The same program called from Python, one request per batch."""

    def __init__(self, artifact: Path) -> None:
        manifest, self.schema = read_artifact(artifact)
        self.version = manifest.version
        self.program = load_program(artifact / PROGRAM)

    def uncached(self, lines: Sequence[bytes]) -> list[Json]:
        """Answers of the engine without a store."""
        engine = Engine(self.program.ranking, self.schema, store=None, version=self.version)
        return [without_age(answer) for answer in score_lines(engine, lines, batch_requests=1)]

    def cached(self, lines: Sequence[bytes], capacity_bytes: int, ttl_s: float) -> list[Json]:
        """Answers through the program's own cache, which is emptied afterwards."""
        self.program.configure(capacity_bytes, ttl_s)
        requests = [parse_request(decode_request(line), self.schema) for line in lines]
        answers = [self._rank(request) for request in requests]
        for request in requests:
            self.program.forget(user_key(request.user_id))
        return answers

    @torch.no_grad()
    def _rank(self, request: Request) -> Json:
        found, use = self.program.rank(request_tensors([request], self.schema))
        scores = answered_scores(found, self.schema.tasks)
        status, reason, cached, computed = use[0].tolist()
        names = self.program.status_names()[status], self.program.reason_names()[reason]
        cache = CacheUse(*names, cached, computed, "pages" if cached else "none")
        answer = Answer(request.request_id, scores, str(self.version), cache)
        return without_age(answer.to_json())


def without_age(answer: Json) -> Json:
    """Drop ``staleness_s`` from an answer: a host's program does not know the age of its K/V."""
    if "cache" in answer:
        cache = {name: value for name, value in answer["cache"].items() if name != "staleness_s"}
        return answer | {"cache": cache}
    return answer


# --- real models


def grown(lines: Sequence[bytes]) -> list[bytes]:
    """Each request three times: with half of its history, then twice with all of it."""
    asked = []
    for line in lines:
        raw = json.loads(line)
        half = {name: cells[: len(cells) // 2] for name, cells in raw["history"].items()}
        asked += [json.dumps(raw | {"history": half}).encode(), line, line]
    return asked


def statuses_of(answers: list[Json]) -> set[tuple[str, str]]:
    return {(answer["cache"]["status"], answer["cache"]["reason"]) for answer in answers}


def test_scores_and_statuses_are_pythons_to_the_bit(
    ask: Ask, artifact: Path, requests_file: Path
) -> None:
    python, lines = Python(artifact), requests_file.read_bytes().splitlines()
    first = json.loads(lines[0])
    for group in ("history", "candidates"):
        lines.append(json.dumps(first | {group: {key: [] for key in first[group]}}).encode())
    uncached = ask(artifact, lines, "--cache", "off")
    assert uncached == python.uncached(lines)
    assert statuses_of(uncached) == {("bypass", "cache_off")}
    lines = grown(lines)
    cached = ask(artifact, lines)
    assert cached == python.cached(lines, CAPACITY_BYTES, TTL_S)
    assert statuses_of(cached) >= {("hit", ""), ("miss", "cold"), ("partial", "cold"), TOO_SHORT}
    # Two layers of 16 floats a key and a value are 8 KiB a page of 32 events.
    small = ask(artifact, lines + lines, "--capacity-bytes", 4 * 8192, "--ttl-s", 0.5)
    assert small == python.cached(lines + lines, 4 * 8192, 0.5)
    assert ("miss", "evicted") in statuses_of(small)


def test_quantised_tables_and_own_operators_are_loaded_and_tasks_are_named(
    host: Path, ask: Ask, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The program calls operators of fbgemm that others do not, and some that only we have."""
    schema = replace(SCHEMA, tasks=("like", "love"))
    model = quantise_tables(RankingModel(make_dlrm(5, schema)).eval(), "int8")
    artifact = tmp_path_factory.mktemp("native") / "artifact"
    export_model(model, schema, artifact)
    raws = [draw_raw(events, 3, seed) for seed, events in enumerate((0, 1, 5, 14, 14, 40))]
    raws.append(draw_raw(5, 0, 6))
    lines = grown([json.dumps(raw).encode() for raw in raws])
    python = Python(artifact)
    answers = ask(artifact, lines)
    assert answers == python.cached(lines, CAPACITY_BYTES, TTL_S)
    assert [*answers[0]["scores"]] == ["like", "love"]
    assert answers[-1]["scores"] == {"like": [], "love": []}
    assert ask(artifact, lines, "--cache", "off") == python.uncached(lines)
    # A host checks the golden scores of every task.
    refused = tmp_path_factory.mktemp("refused")
    shutil.copytree(artifact, refused / "spoilt")
    rewrite(refused / "spoilt" / "golden.json", add_to_love)
    said = refusal(host, refused)
    assert "golden.json: the program does not agree: candidate 0 has the score" in said
    assert said.endswith(" for task love")


def add_to_love(golden: Any) -> None:
    one = next(one for one in golden if one["scores"]["love"])
    one["scores"]["love"][0] += 1e-4


@pytest.mark.skipif(not RETAIL.is_dir(), reason="Online Retail does not lie beside the checkout")
def test_500_real_requests_are_scored_as_in_python(
    ask: Ask, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("retail")
    requests = folder / "requests.jsonl"
    given = ("data=online_retail", f"data.root={RETAIL}", "count=500", "candidates=30")
    run_pipeline("make_requests", *given, f"output={requests}")
    lines = requests.read_bytes().splitlines()
    schema = schema_of([json.loads(line) for line in lines[:300]])
    export_model(RankingModel(make_dlrm(6, schema)).eval(), schema, folder / "artifact")
    python = Python(folder / "artifact")
    assert ask(folder / "artifact", lines, "--cache", "off") == python.uncached(lines)
    answers = ask(folder / "artifact", lines)
    assert answers == python.cached(lines, CAPACITY_BYTES, TTL_S)
    assert len(answers) == 500
    assert {("hit", ""), ("miss", "cold")} <= statuses_of(answers)


def schema_of(raws: list[Json]) -> FeatureSchema:
    """Return Online Retail's schema, with vocabularies of the ids in the requests."""

    def vocabulary(ids: Iterable[Any]) -> Vocabulary:
        return Vocabulary(list(dict.fromkeys(str(one) for one in ids)))

    items = (item for raw in raws for item in raw["history"][ITEM] + raw["candidates"][ITEM])
    countries = (one for raw in raws for one in raw["context"]["country"])
    return FeatureSchema(
        {
            USER: vocabulary(raw[USER] for raw in raws),
            ITEM: vocabulary(items),
            "context.country": vocabulary(countries),
        },
        context=("country",),
        event_attributes=(),
        item_attributes=(),
        item_floats=("price",),
        histories=(History(HISTORY, Window(96, 32)),),
    )


# --- requests to tensors

PLAIN = FeatureSchema(
    {USER: Vocabulary(["7", "nine"]), ITEM: Vocabulary([str(place) for place in range(12)])},
    context=(),
    event_attributes=(),
    item_attributes=(),
    item_floats=(),
    histories=(History("events", Window(6, 2)),),
)


def with_items(map_of_ids: IdMap) -> FeatureSchema:
    vocabularies = PLAIN.vocabulary_by_column | {ITEM: map_of_ids}
    return replace(PLAIN, vocabulary_by_column=vocabularies)


class Echo(nn.Module):
    """A program whose scores are its input tensors and their names, for one unnamed task."""

    user_key: Final[str] = USER_KEY

    def __init__(self) -> None:
        super().__init__()
        self.model_version = ECHO_VERSION

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        parts: list[Tensor] = []
        for name in sorted(features.keys()):
            # Each language may number users differently.
            if name != self.user_key:
                tensor = features[name]
                parts.append(torch.tensor([ord(letter) for letter in name]))
                parts.append(torch.tensor(tensor.size()))
                parts.append(torch.tensor([tensor.is_floating_point(), tensor.is_contiguous()]))
                parts.append(tensor.flatten())
        return torch.cat([part.double() for part in parts]).unsqueeze(1)

    @torch.jit.export
    def task_names(self) -> list[str]:
        return [""]

    @torch.jit.export
    def rank(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.forward(features), torch.tensor([[0, 0, 0, 0]])

    @torch.jit.export
    def status_names(self) -> list[str]:
        return ["hit"]

    @torch.jit.export
    def reason_names(self) -> list[str]:
        return [""]

    @torch.jit.export
    def configure(self, capacity_bytes: int, ttl_s: float) -> None:
        pass

    @torch.jit.export
    def forget(self, user: int) -> None:
        pass


def echo_of(raw: Json, schema: FeatureSchema) -> list[float]:
    """Return the scores of an echo for Python's tensors."""
    return Echo()(request_tensors([parse_request(raw, schema)], schema)).flatten().tolist()


def write_echo(folder: Path, schema: FeatureSchema) -> Path:
    """Write the files of an artifact that a host reads."""
    raw = draw_raw_request(schema, 3, 2, seed=9)
    golden = [{"request": raw, "scores": echo_of(raw, schema)}]
    model, tables = ECHO_VERSION.split("-")
    manifest = {"model_digest": model + "f" * 48, "tables_digest": tables + "f" * 48}
    for name, values in (("golden", golden), ("manifest", manifest)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    save_schema(folder, schema)
    torch.jit.save(script_model(Echo()), str(folder / PROGRAM))
    return folder


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echo(tmp_path_factory.mktemp("echo"), SCHEMA)


OWN = schema_with(Window(14, 7))


@pytest.fixture(scope="module")
def own_echo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_echo(tmp_path_factory.mktemp("own"), OWN)


@pytest.mark.parametrize(
    "schema", [SCHEMA, TWO_HISTORIES, PLAIN, OWN], ids=["one", "two", "plain", "own"]
)
def test_tensors_are_pythons(ask: Ask, tmp_path: Path, schema: FeatureSchema) -> None:
    (tmp_path / "artifact").mkdir()
    folder = write_echo(tmp_path / "artifact", schema)
    raws = [
        draw_raw(events, candidates, seed=100 * events + candidates, schema=schema)
        for events in (0, 1, 5, 6, 7, 14, 15, 29)
        for candidates in (0, 1, 4)
    ]
    answers = ask(folder, [json.dumps(raw).encode() for raw in raws])
    assert [a["request_id"] for a in answers] == [raw["request_id"] for raw in raws]
    assert [a["scores"] for a in answers] == [echo_of(raw, schema) for raw in raws]


@pytest.mark.parametrize("value", [None, "3", True, [1.0], {}, 10**31])
def test_a_float_of_the_context_or_of_an_event_that_is_no_number_is_refused(
    ask: Ask, own_echo: Path, value: Any
) -> None:
    raw = draw_raw(3, 2, seed=4, schema=OWN)
    raws = {
        "history.dwell": changed(raw, "history", dwell=[1.0, value, 2.0]),
        "context.age": changed(raw, "context", age=value),
    }
    answers = ask(own_echo, [json.dumps(one).encode() for one in raws.values()])
    for (name, wrong), answer in zip(raws.items(), answers, strict=True):
        with pytest.raises(RequestError, match=f"{name} holds .*; a finite number is allowed"):
            parse_request(wrong, OWN)
        assert answer["error"]["message"].startswith(f"{name} holds ")
        assert answer["error"]["message"].endswith("; a finite number is allowed")


def test_cells_and_numbers_of_every_kind_are_read_as_in_python(ask: Ask, echo: Path) -> None:
    plain = draw_raw(5, 4, seed=3)
    candidates = plain["candidates"]
    young = changed(plain, history={name: [] for name in plain["history"]})
    raws = [
        *(changed(young, time=time) for time in (0, 86_399, 86_400, 1.75e9, 1_699_999_999.9)),
        *(changed(plain, user_id=one) for one in (7, "user 3", "7", 2**63, 2**64, 10**40, "ü\0")),
        *(changed(plain, user_id=one) for one in ("7.0", " 7")),
        *(changed(plain, request_id=one) for one in (None, 0, -5, 2**70, "ü \u2028", "")),
        changed(plain, context={"country": "GB"}),
        changed(plain, context={"country": None}),
        changed(plain, context={"country": ["GB", None, "AT", 9]}),
        changed(plain, "candidates", item_id=[100, "100", None, 10**30]),
        changed(plain, "candidates", genres=["genre 1", None, [], ["genre 1", None]]),
        changed(plain, "candidates", price=[-0.0, 1e-320, -1e30, 10**29]),
        changed(plain, "candidates", price=[3, -4, 2**64, 0.1]),
        # A thousand prices: the logarithms of two libraries differ in their last bits.
        changed(
            plain,
            candidates={
                **{name: cells[:1] * 1000 for name, cells in candidates.items()},
                "price": [(-1) ** place * 1.07**place / 1e9 for place in range(1000)],
            },
        ),
    ]
    answers = ask(echo, [json.dumps(raw).encode() for raw in raws])
    assert [a["request_id"] for a in answers] == [raw["request_id"] for raw in raws]
    assert [a["scores"] for a in answers] == [echo_of(raw, SCHEMA) for raw in raws]


# --- ids

SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2005\u200a\u2028\u2029\u202f\u205f\u3000"
# Not spaces to Python: a zero width space, a byte order mark, a Mongolian vowel separator, DEL.
NO_SPACES = "\u200b\ufeff\u180e\x7f"
DIGITS = ("0", "7", "10", "17850", "007", "-0", "-1", "-17850", "1" * 30, "٣", "1_0", "+7", "")
TAILS = ("", ".0", ".00", ".", ".5", ".05", "e+16", "e+2", "e+1600", "e+400", "E+16", "e16", "e-05")
ID_TEXTS = ("True", "False", "true", "TRUE", "None", "nan", "inf", "85123A", "ünï", ".0", "e+16")
NUMBERS = (
    *(0, 7, -1, 17850, -(2**63), 2**63 - 1, 2**63, 2**64, -(10**40), True, False, 17850.0, -0.0),
    *(3.5, -3.5, 0.1, 1e-05, 1.5e-07, 0.0001, 0.00012345, 1e15, 1e16, 1e22, 1e23, 1.5e300, 5e-324),
    *(123456789.125, 2.0**53, 2.0**53 + 2, 1 / 3, 1.7976931348623157e308, 9007199254740993.0),
)


def drawn_spellings(rng: random.Random) -> list[Any]:
    """Return ids as files and clients spell them, without blank and too long ones."""
    around = (*SPACES, *NO_SPACES, "", "", "", "")
    texts = [digits + tail for digits in DIGITS for tail in TAILS] + list(ID_TEXTS)
    texts += [rng.choice(around) + rng.choice(around) + text for text in texts]
    texts += [text + rng.choice(around) + rng.choice(around) for text in texts]
    floats = [rng.choice((1, -1)) * rng.random() * 10.0 ** rng.randint(-9, 20) for _ in range(300)]
    floats += [float(rng.randrange(10**20)) for _ in range(100)]
    numbers = [*NUMBERS, *floats, *(rng.randrange(-(10**25), 10**25) for _ in range(50))]
    texts += [repr(number) for number in numbers] + [f" {number!r}\t" for number in floats]
    return [one for one in (*texts, *numbers) if 0 < len(canonical_id(one)) <= MAX_ID_CHARACTERS]


@pytest.mark.parametrize("kind", [VOCABULARY, HASHED])
def test_ids_are_spelt_as_in_python(ask: Ask, tmp_path: Path, kind: str) -> None:
    """The host refused " 17850", "17850.0" and 17850.0, or took them for unknown ids."""
    seed = random.randrange(2**32)
    spellings = drawn_spellings(random.Random(seed))
    canonical = list(dict.fromkeys(canonical_id(one) for one in spellings))
    items = Vocabulary(canonical) if kind == VOCABULARY else Hashed(NUM_ROWS, salt=2**63 - 1)
    schema = with_items(items)
    (tmp_path / "artifact").mkdir()
    folder = write_echo(tmp_path / "artifact", schema)
    raw = draw_raw(0, len(spellings), seed=1, schema=schema)
    tensors = request_tensors([parse_request(raw, schema)], schema)
    rows = schema.vocabulary_by_column[ITEM].rows(spellings)
    assert min(rows) > 1
    tensors["candidates.item_id.values"] = torch.tensor(rows)
    [answer] = ask(folder, [json.dumps(changed(raw, "candidates", item_id=spellings)).encode()])
    assert answer["scores"] == Echo()(tensors).flatten().tolist(), seed


def test_hashed_ids_have_the_rows_that_python_always_gave(ask: Ask, tmp_path: Path) -> None:
    schema = with_items(Hashed(NUM_ROWS, SALT))
    (tmp_path / "artifact").mkdir()
    folder = write_echo(tmp_path / "artifact", schema)
    raw = changed(draw_raw(0, len(GOLDEN), seed=1, schema=schema), "candidates", item_id=[*GOLDEN])
    tensors = request_tensors([parse_request(raw, schema)], schema)
    rows = [NUM_RESERVED_ROWS + row for _, row in GOLDEN.values()]
    tensors["candidates.item_id.values"] = torch.tensor(rows)
    [answer] = ask(folder, [json.dumps(raw).encode()])
    assert answer["scores"] == Echo()(tensors).flatten().tolist()


BLANKS = ("", " ", "\t\n", "\x1c", "\xa0\u2003", "\u3000", [], {}, [7])


def test_a_blank_text_or_a_container_is_not_an_id(ask: Ask, echo: Path) -> None:
    """A blank text was the id of an unknown user, item or country."""
    plain = draw_raw(5, 4, seed=3)
    events = plain["history"][ITEM][:4]
    asked: list[tuple[str, Json]] = []
    for blank in BLANKS:
        items = ["100", blank, "101", "102"]
        asked += [
            ("user_id", changed(plain, user_id=blank)),
            ("history.item_id", changed(plain, "history", item_id=[*events, blank])),
            ("candidates.item_id", changed(plain, "candidates", item_id=items)),
            ("context.country", changed(plain, context={"country": [blank]})),
        ]
    answers = ask(echo, [json.dumps(raw).encode() for _, raw in asked])
    said = "; an id is a text that is not blank, an integer, a finite number or a boolean"
    for (name, raw), answer in zip(asked, answers, strict=True):
        assert answer["error"]["type"] == "RequestError", raw
        assert answer["error"]["message"].startswith(f"{name} holds "), raw
        assert answer["error"]["message"].endswith(said), raw


def test_a_user_hits_in_every_spelling(ask: Ask, artifact: Path) -> None:
    """Each spelling of a user's id had K/V of its own."""
    raw = draw_raw_request(read_artifact(artifact)[1], 40, 3, seed=5)
    spellings = (7, 7.0, "7.0", " 7", "7\u2003", "7.00")
    miss, *hits = ask(artifact, [json.dumps(raw | {"user_id": one}).encode() for one in spellings])
    assert miss["cache"]["status"] == "miss"
    assert [hit["cache"]["status"] for hit in hits] == ["hit"] * len(hits)
    for hit in hits:
        assert hit["scores"] == pytest.approx(miss["scores"], rel=0.0, abs=2e-6)


def test_actions_of_a_history_are_spelt_as_all_ids(ask: Ask, tmp_path: Path) -> None:
    """A history of action 1 was empty if a client sent 1.0."""
    histories = (History("seen", Window(6, 2)), History("bought", Window(6, 2), ("1",)))
    actions = SCHEMA.vocabulary_by_column | {"events.action": Vocabulary(["0", "1"])}
    schema = replace(SCHEMA, vocabulary_by_column=actions, histories=histories)
    (tmp_path / "artifact").mkdir()
    folder = write_echo(tmp_path / "artifact", schema)
    raw = draw_raw(4, 2, seed=6, schema=schema)
    spelt = [["1", "0", "1", None], [1, 0, 1.0, None], [" 1", "0.0", "1.00", None]]
    raws = [changed(raw, "history", action=one) for one in spelt]
    answers = ask(folder, [json.dumps(raw).encode() for raw in raws])
    assert [a["scores"] for a in answers] == [echo_of(raws[0], schema)] * 3


def test_unknown_ids_are_counted_by_column(host: Path, echo: Path, tmp_path: Path) -> None:
    raw = draw_raw(3, 3, seed=8) | {"user_id": "nobody", "context": {"country": ["AT", "X", None]}}
    raw = changed(raw, "history", item_id=["100", None, "new"], action=["view", "view", None])
    raw = changed(raw, "history", genres=[["new", "newer"], [], ["genre 1"]])
    raw = changed(raw, "candidates", item_id=["new", "100", None], genres=[[], [], ["genre 2"]])
    lines = [raw | {"report": ["unknown_ids"]}, raw, raw | {"report": []}]
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(one) + "\n" for one in lines))
    done = run_host(host, echo, requests, output)
    assert done.returncode == 0, done
    asked, silent, empty_report = map(json.loads, output.read_text().splitlines())
    assert asked["unknown_ids"] == {
        "user_id": 1,
        "context.country": 1,
        "history.item_id": 1,
        "history.genres": 2,
        "candidates.item_id": 1,
    }
    assert "unknown_ids" not in silent | empty_report
    [_, counted, _] = done.stdout.splitlines()
    assert counted == (
        "unknown ids: candidates.item_id 3 of 6 (50.0 %), context.country 3 of 6 (50.0 %), "
        "history.genres 6 of 9 (66.7 %), history.item_id 3 of 6 (50.0 %), user_id 3 of 3 (100.0 %)"
    )


# --- histories in order

NEWEST = 1_700_000_000


# Times of five events, and what is wrong with them.
REFUSED_TIMES: list[tuple[list[float], str]] = [
    ([5, 9, 9, 8, 7], "history.time[3] is 8, before history.time[2] = 9: events are given"),
    ([9, 8, 7, 6, 5], "history.time[1] is 8, before history.time[0] = 9: events are given"),
    ([5.9, 5.1, 6.5, 5.99, 7], "history.time[3] is 5, before history.time[2] = 6: events are"),
    ([1, 2, NEWEST, 3, 4], f"history.time[2] is {NEWEST}, not before the request's time {NEWEST}"),
    (
        [1, 2, 3, 4, NEWEST + 0.5],
        f"history.time[4] is {NEWEST}, not before the request's time {NEWEST}",
    ),
    (
        [1, 2, 3, 4, NEWEST + 10],
        f"history.time[4] is {NEWEST + 10}, not before the request's time {NEWEST}",
    ),
]


def test_a_history_that_training_cannot_have_seen_is_refused(ask: Ask, echo: Path) -> None:
    """A history in reverse order, or from the future, was scored without an error."""
    asked = []
    for times, _ in REFUSED_TIMES:
        raw = changed(draw_raw(5, 2, seed=3) | {"time": NEWEST + 0.9}, "history", time=times)
        early = {name: cells * 8 for name, cells in raw["history"].items()}
        # The window holds 14 events: these are not read.
        early["time"] = [*times, *[NEWEST - 1] * 35]
        asked += [raw, changed(raw, history=early)]
    answers = ask(echo, [json.dumps(one).encode() for one in asked])
    assert [answer["error"]["type"] for answer in answers] == ["RequestError"] * len(asked)
    for (_, message), answer in zip(REFUSED_TIMES, answers[::2], strict=True):
        assert message in answer["error"]["message"]


def test_events_of_one_second_and_the_second_before_the_request_are_scored(
    ask: Ask, echo: Path
) -> None:
    raw = draw_raw(5, 2, seed=3) | {"time": NEWEST + 0.5}
    raw = changed(raw, "history", time=[0.2, 0.1, 5, 5.9, NEWEST - 0.1])
    [answer] = ask(echo, [json.dumps(raw).encode()])
    floored = changed(raw, "history", time=[0, 0, 5, 5, NEWEST - 1])
    assert answer["scores"] == echo_of(floored, SCHEMA)


# --- clients that send their last events


def last_events(raw: Json, num_given: int) -> Json:
    """Return the request with its last events only, and the index of the first of them."""
    first = len(raw["history"]["time"]) - num_given
    cut = {name: cells[first:] for name, cells in raw["history"].items()}
    return raw | {"history": cut | {"first_event": first}}


def test_cut_histories_give_the_tensors_of_whole_ones(ask: Ask, echo: Path) -> None:
    """The window of 14 events, in blocks of 7, started where the client had cut."""
    raws, expected = [], []
    for num_events in (0, 5, 14, 15, 21, 22, 29):
        whole = draw_raw(num_events, 2, seed=num_events)
        cuts = [last_events(whole, given) for given in range(14, num_events + 1)]
        raws += [whole, *cuts]
        expected += [echo_of(whole, SCHEMA)] * (1 + len(cuts))
    answers = ask(echo, [json.dumps(raw).encode() for raw in raws])
    assert [a["scores"] for a in answers] == expected


def test_too_few_events_start_at_the_first_given_block(ask: Ask, echo: Path) -> None:
    """So that cached K/V is extended as long as the given events include its first event."""
    raws, expected = [], []
    for num_events, given, first_read in (
        *((29, 13, 21), (29, 9, 21), (29, 8, 21), (29, 7, 28), (29, 1, 28)),
        *((27, 5, 22), (27, 13, 14)),
    ):
        whole = draw_raw(num_events, 2, seed=7)
        read = last_events(whole, num_events - first_read)
        raws += [last_events(whole, given), read]
        tensors = request_tensors([parse_request(without_first_event(read), SCHEMA)], SCHEMA)
        tensors["history.first_event"] = torch.tensor([first_read])
        expected += [Echo()(tensors).squeeze(1).tolist()] * 2
    answers = ask(echo, [json.dumps(one).encode() for one in raws])
    assert [a["scores"] for a in answers] == expected


def without_first_event(raw: Json) -> Json:
    history = {name: cells for name, cells in raw["history"].items() if name != "first_event"}
    return raw | {"history": history}


def test_cut_histories_hit_and_extend(ask: Ask, artifact: Path) -> None:
    """Every new event of such a client was a miss with reason ``edited``."""
    schema = read_artifact(artifact)[1]
    max_history = schema.histories[0].window.max_history
    num_events = 2 * max_history
    raw = draw_raw_request(schema, num_events, 3, seed=5)
    # Two unknown users have the same embedding and K/V of their own.
    lines: dict[str, list[bytes]] = {"whole": [], "cut": []}
    for last in (num_events - 2, num_events - 1, num_events - 1, num_events):
        history = {name: cells[:last] for name, cells in raw["history"].items()}
        one = changed(raw, history=history)
        of_user = {"whole": one, "cut": last_events(one, max_history)}
        for user, request in of_user.items():
            lines[user].append(json.dumps(request | {USER: user}).encode())
    answers = ask(artifact, lines["whole"] + lines["cut"])
    whole, cut = answers[: len(lines["whole"])], answers[len(lines["whole"]) :]
    assert cut == whole
    assert [one["cache"]["status"] for one in cut] == ["miss", "partial", "hit", "partial"]


def test_a_first_event_that_is_not_an_index_is_refused(ask: Ask, echo: Path) -> None:
    plain = draw_raw(5, 2, seed=3)
    raws = [
        changed(plain, "history", first_event=one)
        for one in (-1, 2**62 + 1, 2**70, 1.0, "3", True, [1])
    ]
    answers = ask(echo, [json.dumps(raw).encode() for raw in raws])
    for raw, answer in zip(raws, answers, strict=True):
        assert answer["error"]["message"].startswith("history.first_event is "), raw
        assert f"; an integer from 0 to {2**62} is allowed" in answer["error"]["message"], raw


def test_histories_of_some_actions_refuse_a_first_event(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    folder = write_echo(tmp_path / "artifact", TWO_HISTORIES)
    raw = draw_raw(5, 2, seed=3, schema=TWO_HISTORIES)
    raws = [changed(raw, "history", first_event=place) for place in (0, None, 4)]
    *scored, refused = ask(folder, [json.dumps(one).encode() for one in raws])
    assert [one["scores"] for one in scored] == [echo_of(raw, TWO_HISTORIES)] * 2
    assert refused["error"]["message"] == (
        "history.first_event is 4; the model's histories ['bought'] keep some actions only, so "
        "how many of their events came before is unknown: send all events"
    )


# --- scores that are not finite


@pytest.fixture
def with_nan(artifact: Path, tmp_path: Path) -> tuple[Path, str]:
    """An artifact whose model gives NaN for one user, and this user."""
    folder = Path(shutil.copytree(artifact, tmp_path / "with_nan"))
    schema = read_artifact(folder)[1]
    golden = {one["request"][USER] for one in json.loads((folder / "golden.json").read_text())}
    vocabulary = schema.vocabulary_by_column[USER]
    user = next(one for one in vocabulary.examples if one not in golden)
    program = load_program(folder / PROGRAM)
    [table] = [one for name, one in program.named_parameters() if "bag_user_id" in name]
    with torch.no_grad():
        table[vocabulary.row(user)] = torch.nan
    torch.jit.save(program, str(folder / PROGRAM))
    return folder, user


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_scores_that_are_not_finite_are_their_requests_error(
    ask: Ask, artifact: Path, with_nan: tuple[Path, str], cache: str
) -> None:
    """One NaN in a table ended the host without an answer."""
    folder, user = with_nan
    good = draw_raw_request(read_artifact(artifact)[1], 9, 3, seed=5) | {"user_id": "nobody"}
    raws = [good, *(good | {"user_id": user, "request_id": one} for one in ("r 1", 7, None)), good]
    answers = ask(folder, [json.dumps(raw).encode() for raw in raws], "--cache", cache)
    assert len(answers[0]["scores"]) == len(answers[-1]["scores"]) == 3
    said = "the model gave no finite score for candidates 0, 1, 2 of request "
    for request_id, shown, answer in zip(
        ("r 1", 7, None), ("r 1", "7", "None"), answers[1:-1], strict=True
    ):
        error = {"type": "ScoreError", "message": said + shown}
        assert answer == {"request_id": request_id, "error": error}


# --- broken requests

# Lines that Python refuses with another message: its reader knows NaN and names JSON's types.
OTHER_MESSAGE = {
    "no JSON",
    "half a line",
    "not UTF-8",
    "UTF-16",
    "deep",
    "deep inside",
    "an array",
    "a number",
    "null",
    "NaN for an id",
    "infinity for an id",
    "blank events",
    "NaN for a time",
    "infinite time",
    "NaN for the time of an event",
    "NaN for a price",
    "a column that is no list",
    "a group that is no object",
    "a huge time",
    "too many digits",
}


def test_broken_lines_are_refused_and_unusual_ones_scored_in_order(
    ask: Ask, artifact: Path, requests_file: Path
) -> None:
    raws = [json.loads(line) for line in requests_file.read_text().splitlines()]
    whole = next(raw for raw in raws if len(raw["history"]["time"]) > 5)
    named = {**broken_lines(whole), **unusual_lines(whole)}
    good = json.dumps(raws[0]).encode()
    lines = [one for line in named.values() for one in (line, b" ", good)]
    answers = ask(artifact, lines, "--cache", "off")
    expected = Python(artifact).uncached(lines)
    assert answers[1::2] == expected[1::2]
    for name, one, other in zip(named, answers[::2], expected[::2], strict=True):
        if name in OTHER_MESSAGE:
            assert set(one) == {"request_id", "error"}, name
            assert one["error"]["type"] == "RequestError"
            assert 10 < len(one["error"]["message"]) < 300, name
        else:
            assert one == other, name


def test_a_line_that_is_not_json_is_refused(ask: Ask, echo: Path) -> None:
    line = json.dumps(draw_raw(2, 1, seed=4) | {"request_id": "r"}).encode()
    tails = (b', "x": NaN}', b', "x": 1e999}', b', "x": "\\ud800"}', b"}}", b"}\0", b', "x": 01}')
    answers = ask(echo, [line[:-1] + tail for tail in (*tails, b', "x": [1E9, "\\ud83d\\ude00"]}')])
    assert ["error" in answer for answer in answers] == [True] * len(tails) + [False]
    assert answers[-1]["scores"] == echo_of(json.loads(line), SCHEMA)


# Python's reader accepts these, which are not valid JSON or text; 1e999 is infinity to it.
PYTHONS_OWN = (b"NaN", b"Infinity", b"1e999", b"\\ud8", b"\xed\xa0\x80")
VALUES = (
    *(b"null", b"true", b"NaN", b"1e999", b"-0", b"-1", b"7", b"1.5", b"1e3", b"1" * 30),
    *(b'""', b'"genre 1"', b"[]", b'["AT", null]', b"[[]]", b"{}", b'{"a": 1}'),
)
PIECES = (
    *(*VALUES, *PYTHONS_OWN, b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\x0b"),
    *(b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":"),
)


def mutated(line: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or overwrite a few parts of a line; never its end."""
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(line) + 1)
        end = min(len(line), start + rng.choice((0, 0, 1, 1, 2, 5, 40)))
        new = rng.choice(
            (b"", rng.choice(PIECES), rng.choice(PIECES), line[start:end] * 2, rng.randbytes(2))
        )
        line = line[:start] + new.replace(b"\n", b"") + line[end:]
    return line or b"x"


def with_other_cell(raw: Json, rng: random.Random) -> bytes:
    """Replace one value of a request, at any depth."""
    raw = copy.deepcopy(raw)
    inner: Any = raw
    while True:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.2:
            break
        inner = inner[key]
    inner[key] = "THE VALUE"
    return json.dumps(raw).encode().replace(b'"THE VALUE"', rng.choice(VALUES))


def test_no_line_crashes_the_host(ask: Ask, echo: Path) -> None:
    """Mutated lines are refused or read as in Python, and the next good line is scored."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    raws = [draw_raw(events, 2, seed=events) for events in (3, 8)]
    good = json.dumps(raws[0]).encode()
    spoilt = []
    for _ in range(1500):
        raw = rng.choice(raws)
        spoilt += [mutated(json.dumps(raw).encode(), rng), with_other_cell(raw, rng)]
    spoilt = [line for line in spoilt if line.strip()]
    answers = ask(echo, [one for line in spoilt for one in (line, good)])
    assert [a["scores"] for a in answers[1::2]] == [echo_of(raws[0], SCHEMA)] * len(spoilt)
    num_read = 0
    for line, answer in zip(spoilt, answers[::2], strict=True):
        try:
            raw = decode_request(line)
            expected = echo_of(raw, SCHEMA)
        except RequestError:
            assert "error" in answer, (seed, line)
        else:
            if "error" in answer:
                assert any(own in line for own in PYTHONS_OWN), (seed, line, answer)
            else:
                assert answer["scores"] == expected, (seed, line)
                assert answer["request_id"] == raw.get("request_id"), (seed, line)
                num_read += 1
    assert 0.1 * len(spoilt) < num_read < 0.5 * len(spoilt)


# --- times, arguments, files


def test_times_are_of_the_lines_that_were_scored(ask: Ask, echo: Path, tmp_path: Path) -> None:
    good = json.dumps(draw_raw(2, 1, seed=4)).encode()
    ask(echo, [good, b"{}", b"", good], "--times", tmp_path / "times.json", "--threads", 1)
    first, refused, last = json.loads((tmp_path / "times.json").read_text())
    assert refused is None
    assert 0 < first < 10_000
    assert 0 < last < 10_000


def test_an_empty_file_has_no_answers(ask: Ask, echo: Path) -> None:
    assert ask(echo, []) == []
    assert ask(echo, [b"", b" \t\r", b"\x0b\x0c"]) == []


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def spoilt(echo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(echo, tmp_path / "spoilt"))


def refusal(host: Path, folder: Path, *arguments: Any) -> str:
    """Run the host, which must fail without writing anything; return its message."""
    requests, output = folder / "requests.jsonl", folder / "out" / "answers.jsonl"
    output.parent.mkdir()
    requests.write_text("{}\n")
    done = run_host(host, *(arguments or (folder / "spoilt", requests, output)))
    assert done.returncode == FAILED, done
    assert list(output.parent.iterdir()) == []
    [message] = done.stderr.splitlines()
    return message


@pytest.mark.parametrize("spoil", [truncate, empty, Path.unlink])
@pytest.mark.parametrize(
    "name", [PROGRAM, "manifest.json", "schema.json", "ids.npy", "golden.json"]
)
def test_a_spoilt_artifact_is_refused_by_file(
    host: Path, spoilt: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(spoilt / name)
    assert f"{spoilt / name}: " in refusal(host, tmp_path)


def test_a_folder_for_a_file_is_refused(host: Path, spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "schema.json").unlink()
    (spoilt / "schema.json").mkdir()
    assert "schema.json: there is no such file to read" in refusal(host, tmp_path)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_other_scores_than_the_golden_ones_are_refused(
    host: Path, ask: Ask, spoilt: Path, tmp_path: Path
) -> None:
    rewrite(spoilt / "golden.json", lambda golden: add_to_score(golden, 1e-5))
    assert ask(spoilt, []) == []
    rewrite(spoilt / "golden.json", lambda golden: add_to_score(golden, 2e-5))
    assert "golden.json: the program does not agree: candidate 3 has" in refusal(host, tmp_path)


def items_of(schema: Any) -> Any:
    return schema["vocabulary_by_column"][ITEM]


def add_to_score(golden: Any, more: float) -> None:
    golden[0]["scores"][3] += more


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("manifest.json", lambda v: v.update(model_digest="e" * 64), "it is of model 0123456789ab"),
        ("manifest.json", lambda v: v.clear(), "digest' not found"),
        ("schema.json", lambda v: v["histories"][0]["window"].update(block=0), "block is 0"),
        ("schema.json", lambda v: v.update(context="country"), "type must be array"),
        ("schema.json", lambda v: items_of(v).update(num_ids=500), "has 500 ids from "),
        ("schema.json", lambda v: items_of(v).update(kind="managed"), "ids are 'managed'"),
        ("golden.json", lambda v: v[0]["request"].pop("time"), "the request has no 'time'"),
        ("golden.json", lambda v: v[0]["scores"].pop(), "scores, not"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    host: Path, spoilt: Path, tmp_path: Path, name: str, change: Callable[[Any], None], said: str
) -> None:
    rewrite(spoilt / name, change)
    assert said in refusal(host, tmp_path)


def test_a_file_that_cannot_be_read_is_named(host: Path, echo: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "answers.jsonl"
    assert "nowhere.jsonl is no file" in refusal(host, tmp_path, echo, "nowhere.jsonl", output)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("one", "two"), "three paths are needed"),
        (("--cache", "disk"), "--cache is disk; memory and off are allowed"),
        (("--threads", "0"), "--threads is 0; a number from 1 on"),
        (("--ttl-s", "nan"), "--ttl-s is nan; a number from 0.0 on"),
        (("--capacity-bytes", "1G"), "--capacity-bytes is 1G; a number from 1 on"),
        (("--speed", "high"), "cannot read --speed"),
    ],
)
def test_misuse_is_explained(host: Path, options: tuple[str, ...], said: str) -> None:
    done = run_host(host, *options)
    assert done.returncode == MISUSED
    assert said in done.stderr
    assert "usage: kvshare_host ARTIFACT REQUESTS.jsonl ANSWERS.jsonl" in done.stderr
