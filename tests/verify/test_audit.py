"""The audit passes sound models, and names what a planted fault makes K/V or scores depend on."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.encoder_worlds import EXTENDED_NAMES, NAMES, World, raws_of, world_of
from tests.worlds import parse_all
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.export.torchscript import load_program
from torchrec_kvshare.export.triton import write_repository
from torchrec_kvshare.features.tensors import request_tensors
from torchrec_kvshare.history.bidirectional import BidirectionalEncoder
from torchrec_kvshare.history.causal import CausalEncoder
from torchrec_kvshare.history.hstu import HSTUEncoder
from torchrec_kvshare.history.kinds import BIDIRECTIONAL, CAUSAL, HSTU, TARGET_ONLY
from torchrec_kvshare.history.longer import LongerEncoder
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.collection import HistoryPooling, TokenFeatures
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.verify import audit as audit_module
from torchrec_kvshare.verify.audit import Audit, audit_model, audit_table

JaggedByKey = dict[str, JaggedTensor]
PERTURBED = ["candidates", "request_time", "context", "batchmates", "batch_order", "later_events"]
MEMORY = CacheConfig(capacity_bytes=1 << 20, page_size=5)


def audit_of(world: World, model: RankingModel | None = None, seed: int = 0) -> Audit:
    return audit_model(model or RankingModel(world.dlrm).eval(), world.schema, seed)


def planted(kind: str, plant: Callable[[RankingModel], None]) -> tuple[World, RankingModel]:
    """Return a copy of a world's model with a fault planted in it."""
    world = world_of(kind)
    model = RankingModel(copy.deepcopy(world.dlrm)).eval()
    plant(model)
    return world, model


# Sound models.


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_model_may_be_used_across_requests(name: str) -> None:
    audit = audit_of(world_of(name))
    assert (audit.scope, audit.failures) == ("cross_request", [])
    assert audit.append == ("exact" if name in EXTENDED_NAMES else "refused")
    assert list(audit.moved) == PERTURBED
    # Rounding moves K/V far less than is allowed, and perturbations that must move scores do move
    # them: the audit is not blind.
    for perturbed, distance_by_tensor in audit.moved.items():
        for tensor, value in distance_by_tensor.items():
            if tensor == "scores" and perturbed in ("request_time", "context"):
                assert value > 100 * audit_module.TOLERANCE
            elif (name, perturbed) != (BIDIRECTIONAL, "later_events"):
                assert value <= audit_module.TOLERANCE / 10


def test_every_layer_of_every_history_is_watched() -> None:
    layers = ["history/layer_0", "history/layer_1"]
    assert list(audit_of(world_of(CAUSAL)).moved["candidates"]) == [*layers, "scores"]
    assert list(audit_of(world_of(CAUSAL)).moved["later_events"]) == layers
    kept_tokens = ["history/events", "scores"]  # target_only keeps no keys and values.
    assert list(audit_of(world_of(TARGET_ONLY)).moved["candidates"]) == kept_tokens


# Faults.


class PositionsFromNewest(TokenFeatures):
    """Counts positions from the newest event, so that they move as events come."""

    def positions(self, *arguments: Any) -> Tensor:
        *_, jagged_by_key, history = arguments
        lengths = jagged_by_key[self.item_keys[history]].lengths().to(torch.int64)
        from_oldest = super().positions(*arguments)
        return torch.repeat_interleave(lengths, lengths) - 1 - from_oldest


def count_from_newest(model: RankingModel) -> None:
    model.collection.token_features.__class__ = PositionsFromNewest


class ScaledByTheBatch(HSTUEncoder):
    """Divides by the longest history of the batch, as HSTU's published code does."""

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        self.scale = 1.0 / int(event_offsets.diff().max())
        return super().prefill(events, event_offsets)


class SeesAll(CausalEncoder):
    """Bidirectional attention that claims to be causal, so that cached K/V is extended."""

    prefill = BidirectionalEncoder.prefill


class NormedOverTheSequence(CausalEncoder):
    """Normalises features over all events of the batch."""

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        spread = events.std(0, correction=0) + 1e-3
        return super().prefill((events - events.mean(0)) / spread, event_offsets)


class ReusesOpenGroups(LongerEncoder):
    """Claims that a group stays valid before all its events have come."""

    def reusable_rows(self, reusable_events: int) -> int:
        return reusable_events // self.merge + 1


class TellsUsersApart(CausalEncoder):
    """Treats the first history of a batch differently from the others."""

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        shown = events.clone()
        shown[: event_offsets[1], :3] += 1.0
        return super().prefill(shown, event_offsets)


class NotANumberAlone(CausalEncoder):
    """Divides by zero where a batch holds one history."""

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        kv = super().prefill(events, event_offsets)
        kv[:, 0] *= math.nan if len(event_offsets) == 2 and len(events) > 5 else 1.0
        return kv


def with_encoder(encoder: type) -> Callable[[RankingModel], None]:
    def plant(model: RankingModel) -> None:
        model.collection.towers()[0].encoder.__class__ = encoder

    return plant


class AgedAtTheRequest(HistoryPooling):
    """Gives event rows their age at the request's time."""

    def event_tokens(self, embedded: JaggedByKey, features: JaggedByKey) -> Tensor:
        lengths = features[self.time_key].lengths().to(torch.int64)
        request_time = features["request.time"].values().repeat_interleave(lengths)
        age = request_time - features[self.time_key].values()
        return super().event_tokens(embedded, features) * (1.0 + age.unsqueeze(1) / 1e7)


class ToldTheContext(HistoryPooling):
    """Gives event rows a context feature of the request."""

    def event_tokens(self, embedded: JaggedByKey, features: JaggedByKey) -> Tensor:
        lengths = features[self.time_key].lengths().to(torch.int64)
        country = features["context.country"].values().repeat_interleave(lengths)
        token = super().event_tokens(embedded, features)
        return token.index_fill(1, torch.tensor([2]), 0.0) + token * country.unsqueeze(1)


class ToldTheCandidates(HistoryPooling):
    """Gives event rows the candidates' items."""

    def event_tokens(self, embedded: JaggedByKey, features: JaggedByKey) -> Tensor:
        lengths = features[self.time_key].lengths().to(torch.int64)
        items = embedded["candidates.item_id"].values().unflatten(0, (len(lengths), -1))
        told = items.mean(1).repeat_interleave(lengths, dim=0)
        return super().event_tokens(embedded, features) + told


def with_pooling(pooling: type) -> Callable[[RankingModel], None]:
    def plant(model: RankingModel) -> None:
        model.collection.histories.poolings[0].__class__ = pooling

    return plant


class ComparesCandidates(HistoryTower):
    """Subtracts the mean vector of the batch's candidates."""

    def attend(self, *arguments: Any) -> Tensor:
        pooled = super().attend(*arguments)
        return pooled - pooled.mean(0)


def compare_candidates(model: RankingModel) -> None:
    model.collection.towers()[0].__class__ = ComparesCandidates


@pytest.mark.parametrize(
    ("kind", "plant", "failures"),
    [
        (CAUSAL, count_from_newest, ["later_events"]),
        (HSTU, with_encoder(ScaledByTheBatch), ["batchmates", "later_events"]),
        (CAUSAL, with_encoder(SeesAll), ["later_events"]),
        (CAUSAL, with_encoder(NormedOverTheSequence), ["batchmates", "later_events"]),
        ("longer", with_encoder(ReusesOpenGroups), ["later_events"]),
        (CAUSAL, with_encoder(TellsUsersApart), ["batchmates", "batch_order"]),
        (CAUSAL, with_encoder(NotANumberAlone), ["batchmates", "later_events"]),
        (CAUSAL, with_pooling(AgedAtTheRequest), ["request_time"]),
        (TARGET_ONLY, with_pooling(AgedAtTheRequest), ["request_time"]),
        (HSTU, with_pooling(ToldTheContext), ["context"]),
        (CAUSAL, with_pooling(ToldTheCandidates), ["candidates"]),
        (CAUSAL, compare_candidates, ["candidates", "batchmates"]),
    ],
)
def test_a_planted_fault_is_named_and_keeps_kv_within_the_request(
    kind: str, plant: Callable[[RankingModel], None], failures: list[str]
) -> None:
    audit = audit_of(*planted(kind, plant))
    assert (audit.scope, audit.failures) == ("request", failures)
    assert audit.append == ("refused" if "later_events" in failures else "exact")
    distance_by_tensor = audit.moved[failures[0]]
    assert not max(distance_by_tensor.values()) <= 100 * audit_module.TOLERANCE


def test_a_fault_is_found_whatever_requests_are_drawn() -> None:
    for seed in range(10, 14):
        assert audit_of(*planted(CAUSAL, count_from_newest), seed).failures == ["later_events"]


def test_an_encoder_that_claims_nothing_may_be_cached_but_not_extended() -> None:
    world, model = planted(CAUSAL, with_encoder(ClaimsNothing))
    audit = audit_of(world, model)
    assert (audit.scope, audit.append, audit.failures) == ("cross_request", "refused", [])
    assert max(audit.moved["later_events"].values()) <= audit_module.TOLERANCE


class ClaimsNothing(CausalEncoder):
    """Keeps its rows when events come, but does not claim so."""

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        return 0


def test_the_table_says_what_failed_and_how_far_everything_moved() -> None:
    audit = audit_of(*planted(CAUSAL, with_encoder(SeesAll)))
    head, *lines = audit_table(audit).splitlines()
    assert head.split() == ["perturbed", "history/layer_0", "history/layer_1", "scores"]
    assert [line.split()[0] for line in lines] == PERTURBED
    assert [line.endswith("failed") for line in lines] == [*[False] * 5, True]
    assert lines[-1].split()[1:] == [
        *(f"{value:.1e}" for value in audit.moved["later_events"].values()),
        *("-", "failed"),
    ]


def test_a_nan_is_not_hidden_by_a_finite_distance() -> None:
    """max(NaN, x) was x, so that K/V of NaN passed as unmoved."""
    audit = audit_of(*planted(CAUSAL, with_encoder(NotANumberAlone)))
    for name in ("batchmates", "later_events"):
        assert math.isnan(audit.moved[name]["history/layer_0"])


# From the audit to the engine.


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a model that sees later events but claims to be causal."""
    world, model = planted(CAUSAL, with_encoder(SeesAll))
    destination = tmp_path_factory.mktemp("failed") / "artifact"
    export_model(model, world.schema, destination)
    return destination


def test_the_manifest_holds_the_verdict_and_its_figures(failed: Path) -> None:
    written = json.loads((failed / "manifest.json").read_text())["audit"]
    assert written == audit_of(*planted(CAUSAL, with_encoder(SeesAll))).to_json()
    assert (written["scope"], written["append"]) == ("request", "refused")


def test_an_artifact_that_failed_its_audit_keeps_no_kv_between_requests(failed: Path) -> None:
    artifact = load_artifact(failed)
    refusal = r"within a request only: its audit failed at \['later_events'\]; cache=off is allowed"
    with pytest.raises(ConfigError, match=refusal):
        new_engine(artifact, MEMORY)
    requests = parse_all(raws_of(world_of(CAUSAL), [(9, 3, 1)]), artifact.schema)
    [answer] = new_engine(artifact, CacheConfig("off")).rank(requests)
    assert (answer.cache.status, len(answer.ranking_scores)) == ("bypass", 3)


def test_its_program_keeps_no_kv_either(failed: Path, tmp_path: Path) -> None:
    """The cache inside a program extended K/V that the engine would have refused to keep."""
    program = load_program(failed / "model.pt")
    requests = parse_all(raws_of(world_of(CAUSAL), [(9, 3, 1)]), world_of(CAUSAL).schema)
    features = request_tensors(requests, world_of(CAUSAL).schema)
    with pytest.raises(torch.jit.Error, match="the model failed its audit"):
        program.rank(features)
    assert program(features).shape == (3, 2)
    with pytest.raises(ConfigError, match="artifact failed its audit"):
        write_repository(failed, tmp_path / "repository")


def test_an_artifact_whose_audit_passed_keeps_kv_between_requests(
    failed: Path, tmp_path: Path
) -> None:
    passed = Path(shutil.copytree(failed, tmp_path / "artifact"))
    written = json.loads((passed / "manifest.json").read_text())
    written["audit"] |= {"scope": "cross_request", "failures": []}
    (passed / "manifest.json").write_text(json.dumps(written))
    engine = new_engine(load_artifact(passed), MEMORY)
    assert engine.store is not None
