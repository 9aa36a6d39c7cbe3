"""Export a model to compiled graphs and load them: ``torch.export`` and AOTInductor, for the CPU.

The graphs are the model's own functions with the attention operators inside, over the jagged
tensors of a batch: values and lengths by key. They become shared libraries that need only torch and
the operators. The graphs share one copy of the weights, in a file and in memory. The numbers of
users, events, candidates, ids, rows and pages are dynamic. ``graphs.json`` lists each graph's
inputs in order, for a host in any language.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.inputs import check_range
from torchrec_kvshare.export.program import batch_of
from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.batches import with_key
from torchrec_kvshare.features.schema import (
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    first_index_key,
    history_key,
    pages_key,
    visible_key,
)
from torchrec_kvshare.features.tensors import DENSE, FLOAT32, INT64, input_specs
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel

GRAPHS, WEIGHTS = "graphs.json", "weights.pt"
ENCODE, SCORE = "encode", "score"
KV, ROWS = "kv", "rows"
CANDIDATE_REQUEST = candidate_key("request")
INDUCTOR_SETTINGS = {
    # Otherwise every process that loads the graph would use the exporter's number of threads.
    "cpp.dynamic_threads": True,
    # Otherwise the graph would need every feature of this CPU, not only its vector instructions.
    "cpp.march": "",
    # All graphs read the weights from one file.
    "aot_inductor.package_constants_in_so": False,
}

USERS, HISTORIES, CANDIDATES = "users", "histories", "candidates"
# The compiler optimises loops for these sizes; others work too.
USUAL_SIZES = {USERS: 2, HISTORIES: 2, CANDIDATES: 100}
USUAL_IDS = 200
LEAST_SIZE, LEAST_DISTANCE = 5, 3

Inputs = dict[str, Tensor]
Graph = Callable[[Inputs], list[Tensor]]


class GraphInput(NamedTuple):
    """One input of a graph.

    Attributes:
        name: ``<key>.values`` or ``<key>.lengths`` of a feature, or the name of another tensor.
        dtype: ``int64`` or ``float32``.
        shape: sizes; a dynamic size is a name, and sizes with the same name are equal.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]


def write_pt2(model: RankingModel, schema: FeatureSchema, folder: Path) -> list[str]:
    """Compile a model's graphs; needs g++.

    Args:
        model: the trained model, in eval mode.
        schema: its columns.
        folder: gets the files.

    Returns:
        Names of the files written.

    Raises:
        ConfigError: if its tables are sharded or quantised.
    """
    _check_tables(model)
    inputs_by_graph = graph_inputs(model, schema)
    described = {}
    weights: dict[str, Tensor] = {}
    for name, graph in graphs_of(model, schema).items():
        inputs = inputs_by_graph[name]
        program = export_graph(graph, inputs, schema)
        weights |= {name: tensor.detach() for name, tensor in program.state_dict.items()}
        compile_graph(program, folder / f"{name}.pt2")
        described[name] = {"file": f"{name}.pt2", "inputs": [one._asdict() for one in inputs]}
    torch.save(weights, folder / WEIGHTS)
    about = {"cpu": torch.backends.cpu.get_cpu_capability(), "graphs": described}
    (folder / GRAPHS).write_text(json.dumps(about, indent=2) + "\n")
    return [GRAPHS, WEIGHTS, *(f"{name}.pt2" for name in described)]


def load_pt2(folder: Path, schema: FeatureSchema, encoder: dict[str, Any]) -> RankingFunctions:
    """Load the compiled graphs as ranking functions.

    Args:
        folder: holds the files of ``write_pt2``.
        schema: the model's columns.
        encoder: fields of its towers' ``TowerSpec``.

    Returns:
        Functions that use torch's number of threads and share one copy of the weights.

    Raises:
        ArtifactError: if a graph or the weights cannot be loaded, or were made for another CPU.
    """
    about = _read_graphs_json(folder)
    if (here := torch.backends.cpu.get_cpu_capability()) != about["cpu"]:
        raise ArtifactError(
            f"{folder} was compiled for a CPU with {about['cpu']}; this one has {here}"
        )
    try:
        weights = torch.load(folder / WEIGHTS, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be loaded: {error}") from error
    graphs = {}
    for name, described in about["graphs"].items():
        names = [one["name"] for one in described["inputs"]]
        graphs[name] = load_graph(folder / described["file"], names, weights)
    return CompiledRanking(graphs, schema, TowerSpec(**encoder), weights)


def pt2_files(folder: Path) -> list[str]:
    """Return the names of the files that ``load_pt2`` loads from a folder.

    Raises:
        ArtifactError: if ``graphs.json`` is broken.
    """
    graphs = _read_graphs_json(folder)["graphs"]
    return [GRAPHS, WEIGHTS, *(one["file"] for one in graphs.values())]


class EncodingGraph(nn.Module):
    """Encode events to K/V, after cached rows if histories can be extended.

    Args:
        ranking: the model.
        keys: of the batch.
        histories: names of the schema's histories.
    """

    def __init__(self, ranking: RankingModel, keys: list[str], histories: list[str]) -> None:
        super().__init__()
        self.ranking = ranking
        self.keys = keys
        self.histories = histories
        self.extends = ranking.collection.towers()[0].spec.extends

    def batch(self, inputs: Inputs, request_of_candidates: Tensor) -> KeyedJaggedTensor:
        """Build a batch from the inputs of ``keys``."""
        parts = [(key, inputs[f"{key}.values"], inputs[f"{key}.lengths"]) for key in self.keys]
        return batch_of(parts, request_of_candidates)

    def forward(self, inputs: Inputs) -> list[Tensor]:
        """For each history K/V [planes, R, H, D]."""
        batch = self.batch(inputs, torch.empty([0], dtype=torch.int64))
        if not self.extends:
            return self.ranking.prefill(batch)
        cached = [inputs[history_key(name, KV)] for name in self.histories]
        rows = [inputs[history_key(name, ROWS)] for name in self.histories]
        return self.ranking.extend(batch, cached, rows)


class ScoringGraph(EncodingGraph):
    """Logits [C, tasks] over K/V in pages."""

    def forward(self, inputs: Inputs) -> list[Tensor]:
        batch = self.batch(inputs, inputs[CANDIDATE_REQUEST])
        pages = [inputs[history_key(name, KV)] for name in self.histories]
        return [self.ranking.score(inputs[DENSE], batch, pages)]


def graphs_of(model: RankingModel, schema: FeatureSchema) -> dict[str, nn.Module]:
    """Return a model's graphs by name; they share the model's weights.

    Returns:
        ``encode`` and ``score``; each takes the inputs of ``graph_inputs`` and returns a list of
        tensors.
    """
    keys = {
        name: [one.name.removesuffix(".values") for one in inputs if one.name.endswith(".values")]
        for name, inputs in graph_inputs(model, schema).items()
    }
    histories = [history.name for history in schema.histories]
    return {
        ENCODE: EncodingGraph(model, keys[ENCODE], histories),
        SCORE: ScoringGraph(model, keys[SCORE], histories),
    }


def graph_inputs(model: RankingModel, schema: FeatureSchema) -> dict[str, list[GraphInput]]:
    """Return the inputs of each graph, in order: features as values and lengths, and K/V.

    ::

        # B requests over U histories of T events in all, C candidates; V ids in all bags of a key
        # user_id, request.time, request.history             [B], [B]
        # context.<column>                                   [V], [B]
        # candidates.item_id; .<attribute>                   [C], [C]; [V], [C]
        # candidates.request, .dense                         [C], [C, num_dense]
        # history.item_id; .<attribute>                      [T], [U]; [V], [T]
        # history.<event attribute>, <event float>, time     [T], [U]; floats as ``bits_of`` them
        # encode: request.first_index.<history>              [U], [U], where events begin
        # encode: history.kv, .rows                          [planes, R, H, D], [U], cached ones
        # score: history.kv, request.pages.<history>         [planes, P, S, H, D]; [pages], [U]

    Unlike the inputs of ``tensors.input_specs``, users are keys with lengths, every candidate is a
    row of its own, and encoding and scoring take different columns.

    Args:
        model: the model of the graphs.
        schema: its columns.

    Returns:
        Inputs by the graph's name; without cached rows if histories cannot be extended.
    """
    encode: list[GraphInput] = []
    score = [*_bags(USER, USERS, USERS), *_bags(REQUEST_TIME, USERS, USERS)]
    score += _bags(REQUEST_HISTORY, USERS, USERS)
    for column in schema.context:
        score += _bags(context_key(column), f"{context_key(column)}.ids", USERS)
    score += _bags(candidate_key(ITEM), CANDIDATES, CANDIDATES)
    for column in schema.item_attributes:
        score += _bags(candidate_key(column), f"{candidate_key(column)}.ids", CANDIDATES)
    score.append(GraphInput(CANDIDATE_REQUEST, INT64, (CANDIDATES,)))
    score.append(GraphInput(DENSE, FLOAT32, (CANDIDATES, schema.num_dense)))
    for history, tower in zip(schema.histories, model.collection.towers(), strict=True):
        name, events = history.name, history_key(history.name, "events")
        num_planes, *head_sizes = tower.kv_shape
        for column in (*schema.event_columns, *schema.event_floats, TIME):
            encode += _bags(history_key(name, column), events, HISTORIES)
        for column in schema.item_attributes:
            key = history_key(name, column)
            encode += _bags(key, f"{key}.ids", events)
        encode += _bags(first_index_key(name), HISTORIES, HISTORIES)
        if tower.spec.extends:
            shape = (num_planes, history_key(name, "cached"), *head_sizes)
            encode.append(GraphInput(history_key(name, KV), FLOAT32, shape))
            encode.append(GraphInput(history_key(name, ROWS), INT64, (HISTORIES,)))
        score += _bags(history_key(name, TIME), events, HISTORIES)
        score += _bags(pages_key(name), f"{pages_key(name)}.ids", HISTORIES)
        table = (num_planes, history_key(name, "pages"), history_key(name, "page_rows"))
        score.append(GraphInput(history_key(name, KV), FLOAT32, (*table, *head_sizes)))
    return {ENCODE: encode, SCORE: score}


def export_graph(
    graph: nn.Module, inputs: Sequence[GraphInput], schema: FeatureSchema
) -> ExportedProgram:
    """Export a graph with dynamic sizes.

    Args:
        graph: takes one dict of tensors.
        inputs: the tensors of that dict.
        schema: its windows give the usual lengths of histories.
    """
    sizes = example_sizes(inputs, schema)
    dims = {size: Dim(f"size_{index}") for index, size in enumerate(sizes)}
    example = {}
    dynamic = {}
    for one in inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in one.shape]
        example[one.name] = torch.zeros(shape, dtype=getattr(torch, one.dtype))
        axes = {axis: dims[size] for axis, size in enumerate(one.shape) if isinstance(size, str)}
        dynamic[one.name] = axes
    # Otherwise the program would refuse sizes of 1.
    patched = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), patched, _log_filtered():
        return torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))


def compile_graph(program: ExportedProgram, path: Path) -> None:
    """Write a program as a shared library without its weights."""
    with torch.no_grad(), warnings.catch_warnings():
        # On import the compiler scripts a module of its own, and it copies its own specs.
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=INDUCTOR_SETTINGS
        )


class CompiledRanking:
    """Ranking functions of compiled graphs; see ``ranking.RankingFunctions``.

    Args:
        graphs: by name.
        schema: the model's columns.
        spec: of its towers.
        weights: the graphs read them in place and do not keep them alive, so this object does.
    """

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        schema: FeatureSchema,
        spec: TowerSpec,
        weights: Mapping[str, Tensor],
    ) -> None:
        self.graphs = graphs
        self.weights = weights
        self.schema = schema
        self.spec = spec
        self.range_by_key = {
            REQUEST_TIME if spec.name == TIME else spec.name.removesuffix(".values"): (
                spec.least,
                spec.most,
            )
            for spec in input_specs(schema)
            if spec.least is not None and spec.most is not None
        }
        with torch.device("meta"):
            towers = [
                HistoryTower(spec, h.window.max_history, h.window.block) for h in schema.histories
            ]
        self.encoders = [tower.encoder for tower in towers]
        self.kv_shapes = [tower.kv_shape for tower in towers]

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C, tasks], histories encoded on the way."""
        tables = [kv.unsqueeze(2) for kv in self.prefill(features)]
        for history, encoder in zip(self.schema.histories, self.encoders, strict=True):
            lengths = features[history_key(history.name, TIME)].lengths().tolist()
            rows = torch.tensor([encoder.num_kv_rows(length) for length in lengths])
            pages = Bags(torch.arange(int(rows.sum())), rows)
            features = with_key(features, pages_key(history.name), pages)
        return self.score(dense, features, tables)

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Return for each history K/V [planes, R, H, D]."""
        inputs = self._inputs(features)
        for history, shape in zip(self.schema.histories, self.kv_shapes, strict=True):
            lengths = inputs[f"{history_key(history.name, TIME)}.lengths"]
            inputs[history_key(history.name, KV)] = torch.empty([shape[0], 0, *shape[1:]])
            inputs[history_key(history.name, ROWS)] = torch.zeros_like(lengths)
        return self.graphs[ENCODE](inputs)

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """Return for each history the K/V of new events after cached rows.

        Raises:
            ValueError: if histories of this kind cannot be extended.
        """
        if not self.spec.extends:
            raise ValueError(f"{self.spec.kind} histories cannot be extended: prefill them whole")
        inputs = self._inputs(features)
        for history, kv, num_rows in zip(self.schema.histories, cached, cached_rows, strict=True):
            inputs[history_key(history.name, KV)] = kv.contiguous()
            inputs[history_key(history.name, ROWS)] = num_rows
        return self.graphs[ENCODE](inputs)

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """Return for each history the rows of K/V that this many events have."""
        pairs = zip(self.encoders, num_events, strict=True)
        return [encoder.num_kv_rows(number) for encoder, number in pairs]

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """Return for each history how many cached events and rows can be reused."""
        numbers = zip(self.encoders, num_matched, cached_events, num_events, strict=True)
        events = [encoder.reusable_events(*others) for encoder, *others in numbers]
        pairs = zip(self.encoders, events, strict=True)
        return [(number, encoder.reusable_rows(number)) for encoder, number in pairs]

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Refuse: the projection of candidates is inside the graph."""
        raise ConfigError("cache.items must be off: a .pt2 graph projects candidates itself")

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Return logits [C, tasks] over K/V in pages.

        Raises:
            ConfigError: if there are projected items.
        """
        if items is not None:
            raise ConfigError("cache.items must be off: a .pt2 graph projects candidates itself")
        keys, inverse_indices = features.inverse_indices()
        inputs = self._inputs(features)
        inputs[CANDIDATE_REQUEST] = inverse_indices[keys.index(USER)]
        inputs[DENSE] = dense
        for history, pages in zip(self.schema.histories, kv_pages, strict=True):
            # The graph reads a row for a history without events too, and hides it.
            table = pages if pages.size(1) else pages.new_zeros([len(pages), 1, *pages.shape[2:]])
            inputs[history_key(history.name, KV)] = table.contiguous()
        [logits] = self.graphs[SCORE](inputs)
        return logits

    def _inputs(self, features: KeyedJaggedTensor) -> Inputs:
        """Return the batch's tensors by name; refuse a row that no table has."""
        inputs: Inputs = {}
        for key, bags in self._jagged(features):
            if key in self.range_by_key:
                check_range(key, bags.values(), *self.range_by_key[key])
            inputs[f"{key}.values"], inputs[f"{key}.lengths"] = bags.values(), bags.lengths()
        return inputs

    def _jagged(self, features: KeyedJaggedTensor) -> Iterator[tuple[str, JaggedTensor]]:
        """Yield the batch by key, and the keys that a graph needs and a batch may lack."""
        jagged_by_key = features.to_dict(compute_offsets=False)
        yield from jagged_by_key.items()
        if USER in jagged_by_key and REQUEST_HISTORY not in jagged_by_key:
            users = jagged_by_key[USER].lengths()
            yield REQUEST_HISTORY, JaggedTensor(torch.arange(users.size(0)), lengths=users)
        for history in self.schema.histories:
            if visible_key(history.name) in jagged_by_key:
                raise ValueError("a .pt2 graph shows candidates whole histories, not prefixes")
            if first_index_key(history.name) not in jagged_by_key:
                lengths = jagged_by_key[history_key(history.name, TIME)].lengths()
                ones = torch.ones_like(lengths)
                yield first_index_key(history.name), JaggedTensor(ones - 1, lengths=ones)


# Neither applies: batches with known sizes need no conversion, and the flag is not read here.
IRRELEVANT = ("Trying to non-strict torch.export KJT to_dict", "is_fx_tracing will return true")


@contextmanager
def _log_filtered() -> Iterator[None]:
    """Drop torch's and torchrec's log records that do not apply to this export."""
    loggers = [logging.getLogger(), logging.getLogger("torch.fx._symbolic_trace")]

    def is_relevant(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(IRRELEVANT)

    for logger in loggers:
        logger.addFilter(is_relevant)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_relevant)


def _check_tables(model: RankingModel) -> None:
    """Refuse tables that torch's own operators cannot read."""
    collection = model.collection
    bags = [one for one in collection.bags.modules() if isinstance(one, EmbeddingBagCollection)]
    configs = [config for one in bags for config in one.embedding_bag_configs()]
    if configs != collection.bags.embedding_bag_configs():
        raise ConfigError(
            f"the ranking stage's bags are {type(collection.bags).__name__}; only those made "
            "of EmbeddingBagCollections, neither sharded nor quantised, can be compiled"
        )
    if not isinstance(collection.token_embeddings, EmbeddingCollection):
        raise ConfigError(
            f"the tokens' tables are a {type(collection.token_embeddings).__name__}; only an "
            "EmbeddingCollection, neither sharded nor quantised, can be compiled"
        )


def _read_graphs_json(folder: Path) -> dict[str, Any]:
    """Read ``graphs.json`` and check the fields that are used here."""
    path = folder / GRAPHS
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        texts = [about["cpu"]]
        for one in about["graphs"].values():
            texts += [one["file"], *(each["name"] for each in one["inputs"])]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name in it is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is broken: {error!r}") from error
    return about


def load_graph(path: Path, names: Sequence[str], weights: Mapping[str, Tensor]) -> Graph:
    """Load a graph that ``compile_graph`` wrote.

    Args:
        path: of its file.
        names: of its inputs, in order.
        weights: by the program's names; the caller must keep them alive.

    Raises:
        ArtifactError: if it cannot be loaded.
    """
    try:
        package = torch._inductor.aoti_load_package(str(path))
        own = {name: weights[name] for name in package.get_constant_fqns()}
        package.load_constants(own, check_full_update=True, user_managed=True)
    except (RuntimeError, KeyError) as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return lambda inputs: package.loader.run([inputs[name] for name in names])


def _bags(key: str, ids: str, rows: str) -> list[GraphInput]:
    return [
        GraphInput(f"{key}.values", INT64, (ids,)),
        GraphInput(f"{key}.lengths", INT64, (rows,)),
    ]


def example_sizes(inputs: Sequence[GraphInput], schema: FeatureSchema) -> dict[str, int]:
    """Choose an example value for each dynamic size of an export.

    No size is small, and no two are close: the compiler silently assumes that whatever holds for
    the examples, such as equal sizes or a size below 2, always holds.
    """
    windows = {
        history_key(history.name, rows): history.window.max_history
        for history in schema.histories
        for rows in ("events", "cached")
    }
    size_by_name: dict[str, int] = {}
    for name in sorted({size for one in inputs for size in one.shape if isinstance(size, str)}):
        size = max(LEAST_SIZE, windows.get(name, USUAL_SIZES.get(name, USUAL_IDS)))
        while any(abs(size - other) < LEAST_DISTANCE for other in size_by_name.values()):
            size += 1
        size_by_name[name] = size
    return size_by_name
