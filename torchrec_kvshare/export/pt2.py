"""Export to compiled graphs and load again: ``torch.export`` and AOTInductor, for the CPU.

The graphs of ``export/padded.py`` become shared libraries that need torch's and nothing else. The
numbers of users, events, candidates, ids, rows and pages are free, from one on. ``graphs.json``
names each graph's inputs in order, for a host of any language.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_shapes
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_kvshare.data.schema import (
    FIRST_PLACE,
    ITEM,
    PAGES,
    POSITION,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    history_key,
    visible_key,
)
from torchrec_kvshare.engine import RankingFunctions
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.padded import (
    EXTEND,
    KV,
    NO_ID,
    PREFILL,
    RANK,
    ROWS,
    Inputs,
    lengths_name,
    padded_graphs,
    values_name,
)
from torchrec_kvshare.history.kinds import LONGER, TowerSpec, new_encoder
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.tensors import DENSE, FLOAT32, INT64

GRAPHS = "graphs.json"
INDUCTOR_SETTINGS = {
    # Else the number of threads here would be that of every process that loads the graph.
    "cpp.dynamic_threads": True,
    # Else the graph would need every feature of the CPU here, not only its vector instructions.
    "cpp.march": "",
}

USERS, CANDIDATES = "users", "candidates"
# Sizes that loops are laid out for; all others work too.
USUAL_SIZES = {USERS: 2, CANDIDATES: 100}
USUAL_IDS = 200

Graph = Callable[[Inputs], list[Tensor]]


class GraphInput(NamedTuple):
    """One input of a graph.

    Attributes:
        name: a feature's key, or one of its own.
        dtype: ``int64`` or ``float32``.
        shape: sizes; one that is free has a name, and is the same wherever that name stands.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]


def write_pt2(model: RankingModel, schema: FeatureSchema, folder: Path) -> list[str]:
    """Compile a model's graphs; needs g++.

    Args:
        model: the trained model, in eval mode.
        schema: its columns.
        folder: where the files go.

    Returns:
        Names of the files written.

    Raises:
        ConfigError: if tables of the ranking stage are sharded or quantised.
    """
    inputs_by_graph = graph_inputs(model, schema)
    described = {}
    for name, graph in padded_graphs(model, schema).items():
        inputs = inputs_by_graph[name]
        compile_graph(export_graph(graph, inputs, schema), folder / f"{name}.pt2")
        described[name] = {"file": f"{name}.pt2", "inputs": [one._asdict() for one in inputs]}
    about = {"cpu": torch.backends.cpu.get_cpu_capability(), "graphs": described}
    (folder / GRAPHS).write_text(json.dumps(about, indent=2) + "\n")
    return [GRAPHS, *(f"{name}.pt2" for name in described)]


def load_pt2(folder: Path, schema: FeatureSchema, encoder: dict[str, Any]) -> RankingFunctions:
    """The compiled graphs as ranking functions.

    Args:
        folder: with the files of ``write_pt2``.
        schema: the model's columns.
        encoder: of its towers, as ``TowerSpec`` has it.

    Returns:
        Functions that compute with as many threads as torch has here.

    Raises:
        ArtifactError: if a graph cannot be loaded, or was compiled for another CPU.
    """
    about = json.loads((folder / GRAPHS).read_text())
    if (here := torch.backends.cpu.get_cpu_capability()) != about["cpu"]:
        raise ArtifactError(f"{folder} was compiled for a CPU with {about['cpu']}; this has {here}")
    graphs = {}
    for name, described in about["graphs"].items():
        names = [one["name"] for one in described["inputs"]]
        graphs[name] = _load_graph(folder / described["file"], names)
    return PaddedRanking(graphs, schema, TowerSpec(**encoder))


def graph_inputs(model: RankingModel, schema: FeatureSchema) -> dict[str, list[GraphInput]]:
    """The inputs of each graph, in their order.

    ::

        # the longest of B users has L events, R rows of K/V, N candidates; V ids in all bags
        # history.item_id; action, position, time alike     [B, L]       -1 where there is none
        # history.<attribute>.values, .lengths              [V], [B, L]  0 where there is no event
        # history.kv                                        [planes, T, H, D], pages end to end
        # history.rows                                      [B, R]       rows of it, -1 for none
        # user_id, request.time                             [B]
        # context.<column>.values, .lengths                 [V], [B]
        # candidates.item_id                                [B, N]
        # candidates.<attribute>.values, .lengths           [V], [B, N]
        # candidates.dense                                  [B, N, num_dense]

    Args:
        model: whose graphs they are.
        schema: its columns.

    Returns:
        Inputs by the graph's name.
    """
    encode: list[GraphInput] = []
    cached: list[GraphInput] = []
    rank = _request_inputs(schema)
    for history, tower in zip(schema.histories, model.collection.towers(), strict=True):
        events = history_key(history.name, "events")
        positions = (POSITION,) if tower.spec.has_positions else ()
        for column in (*schema.event_columns, *positions):
            encode.append(GraphInput(history_key(history.name, column), INT64, (USERS, events)))
        for column in schema.item_attributes:
            encode += _bag_inputs(history_key(history.name, column), USERS, events)
        cached += _kv_inputs(history.name, tower.kv_shape, history_key(history.name, "cached"))
        rank.append(GraphInput(history_key(history.name, TIME), INT64, (USERS, events)))
        # A row is an event, but for the kind that merges events.
        rows = history_key(history.name, ROWS) if tower.spec.kind == LONGER else events
        rank += _kv_inputs(history.name, tower.kv_shape, rows)
    return {PREFILL: encode, EXTEND: encode + cached, RANK: rank}


def export_graph(
    graph: nn.Module, inputs: Sequence[GraphInput], schema: FeatureSchema
) -> ExportedProgram:
    """A graph as a program of free sizes.

    Args:
        graph: called with one dict of tensors.
        inputs: what stands in it.
        schema: whose windows say how long histories usually are.
    """
    sizes = {size for one in inputs for size in one.shape if isinstance(size, str)}
    dims = {size: Dim(f"size_{place}") for place, size in enumerate(sorted(sizes))}
    example = {}
    free = {}
    for one in inputs:
        shape = [_usual_size(size, schema) if isinstance(size, str) else size for size in one.shape]
        example[one.name] = torch.zeros(shape, dtype=getattr(torch, one.dtype))
        free[one.name] = {axis: dims[s] for axis, s in enumerate(one.shape) if isinstance(s, str)}
    # Else a program of sizes from 2 on would refuse a size of 1.
    patched = symbolic_shapes.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), patched:
        return torch.export.export(graph, (example,), dynamic_shapes=(free,))


def compile_graph(program: ExportedProgram, path: Path) -> None:
    """Write a program as a shared library with its weights."""
    with torch.no_grad(), warnings.catch_warnings():
        # The compiler scripts a module of its own when it is imported, and copies its own specs.
        warnings.filterwarnings("ignore", ".*torch.jit.*deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated", FutureWarning)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=INDUCTOR_SETTINGS
        )


def _load_graph(path: Path, names: Sequence[str]) -> Graph:
    try:
        loader = torch._inductor.aoti_load_package(str(path)).loader
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    return lambda inputs: loader.run([inputs[name] for name in names])


def _request_inputs(schema: FeatureSchema) -> list[GraphInput]:
    inputs = [GraphInput(USER, INT64, (USERS,)), GraphInput(REQUEST_TIME, INT64, (USERS,))]
    for column in schema.context:
        inputs += _bag_inputs(context_key(column), USERS)
    inputs.append(GraphInput(candidate_key(ITEM), INT64, (USERS, CANDIDATES)))
    for column in schema.item_attributes:
        inputs += _bag_inputs(candidate_key(column), USERS, CANDIDATES)
    inputs.append(GraphInput(DENSE, FLOAT32, (USERS, CANDIDATES, schema.num_dense)))
    return inputs


def _bag_inputs(key: str, *rows: str) -> list[GraphInput]:
    values = GraphInput(values_name(key), INT64, (f"{key}.ids",))
    return [values, GraphInput(lengths_name(key), INT64, rows)]


def _kv_inputs(history: str, kv_shape: tuple[int, int, int], rows: str) -> list[GraphInput]:
    num_planes, num_heads, head_dim = kv_shape
    table = (num_planes, history_key(history, "table"), num_heads, head_dim)
    return [
        GraphInput(history_key(history, KV), FLOAT32, table),
        GraphInput(history_key(history, ROWS), INT64, (USERS, rows)),
    ]


def _usual_size(size: str, schema: FeatureSchema) -> int:
    for history in schema.histories:
        if size in (history_key(history.name, "events"), history_key(history.name, ROWS)):
            return max(2, history.window.max_history)
    return USUAL_SIZES.get(size, USUAL_IDS)


class PaddedRanking:
    """Ranking functions of graphs over padded tensors; see ``engine.RankingFunctions``.

    Args:
        graphs: by name.
        schema: the model's columns.
        spec: of its towers.
    """

    def __init__(self, graphs: Mapping[str, Graph], schema: FeatureSchema, spec: TowerSpec) -> None:
        self.graphs = graphs
        self.schema = schema
        self.spec = spec
        with torch.device("meta"):
            self.encoders = [
                new_encoder(spec, h.window.max_history, h.window.block) for h in schema.histories
            ]

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C], histories encoded on the way."""
        jagged_by_key = features.to_dict()
        rows = []
        for place in range(len(self.encoders)):
            num_rows = self._num_rows(jagged_by_key, place)
            rows.append(numbers_from(num_rows.cumsum(0) - num_rows, num_rows))
        kv = self.graphs[PREFILL](self._event_tensors(jagged_by_key))
        return self._rank(dense, features, jagged_by_key, kv, rows)

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history K/V [planes, R, H, D]."""
        return self.graphs[PREFILL](self._event_tensors(features.to_dict()))

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """For each history K/V of new events behind cached rows.

        Raises:
            ValueError: if histories of this kind cannot be extended.
        """
        if EXTEND not in self.graphs:
            raise ValueError(f"{self.spec.kind} histories cannot be extended: prefill them whole")
        inputs = self._event_tensors(features.to_dict())
        for history, kv, num_rows in zip(self.schema.histories, cached, cached_rows, strict=True):
            rows = numbers_from(num_rows.cumsum(0) - num_rows, num_rows)
            inputs |= _kv_tensors(history.name, kv, rows)
        return self.graphs[EXTEND](inputs)

    def num_rows(self, num_events: list[int]) -> list[int]:
        """Rows of K/V of histories of so many events, in the order of the histories."""
        pairs = zip(self.encoders, num_events, strict=True)
        return [encoder.num_rows(number) for encoder, number in pairs]

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """For each history events and rows of cached K/V that are right for another history."""
        numbers = zip(self.encoders, num_matched, cached_events, num_events, strict=True)
        events = [encoder.reusable_events(*others) for encoder, *others in numbers]
        pairs = zip(self.encoders, events, strict=True)
        return [(number, encoder.reusable_rows(number)) for encoder, number in pairs]

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """Refused: what candidates are before they meet a user is inside the graph."""
        raise ConfigError("cache.items must be off: a .pt2 graph projects candidates itself")

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits [C] over K/V in pages.

        Raises:
            ConfigError: if there are projected items.
        """
        if items is not None:
            raise ConfigError("cache.items must be off: a .pt2 graph projects candidates itself")
        jagged_by_key = features.to_dict()
        rows = []
        for place, history in enumerate(self.schema.histories):
            pages = jagged_by_key[history_key(history.name, PAGES)]
            num_rows = self._num_rows(jagged_by_key, place)
            rows.append(rows_of_pages(pages, kv_pages[place].size(2), num_rows))
        kv = [pages.flatten(1, 2) for pages in kv_pages]
        return self._rank(dense, features, jagged_by_key, kv, rows)

    def _rank(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        jagged_by_key: dict[str, JaggedTensor],
        kv: list[Tensor],
        rows: list[Tensor],
    ) -> Tensor:
        """Logits [C] over the rows [histories, R] of K/V [planes, T, H, D] of each history."""
        keys, inverse_indices = features.inverse_indices()
        candidate_request = inverse_indices[keys.index(USER)]
        order = torch.argsort(candidate_request, stable=True)
        num_requests = jagged_by_key[USER].lengths().numel()
        counts = torch.bincount(candidate_request, minlength=num_requests)
        inputs = self._request_tensors(jagged_by_key)
        inputs |= self._candidate_tensors(jagged_by_key, order, counts)
        inputs[DENSE] = padded(dense[order], counts, 0)
        which = torch.arange(num_requests)
        if REQUEST_HISTORY in jagged_by_key:
            which = jagged_by_key[REQUEST_HISTORY].values()
        for place, history in enumerate(self.schema.histories):
            if visible_key(history.name) in jagged_by_key:
                raise ValueError("a .pt2 graph shows candidates whole histories, not prefixes")
            key = history_key(history.name, TIME)
            time = jagged_by_key[key]
            inputs[key] = padded(time.values(), time.lengths())[which]
            inputs |= _kv_tensors(history.name, kv[place], rows[place][which])
        [logits] = self.graphs[RANK](inputs)  # [B, N]
        flat = logits[torch.arange(logits.size(1)) < counts.unsqueeze(1)]
        return torch.empty_like(flat).index_copy(0, order, flat)

    def _request_tensors(self, jagged_by_key: dict[str, JaggedTensor]) -> Inputs:
        tensors = {key: jagged_by_key[key].values() for key in (USER, REQUEST_TIME)}
        for column in self.schema.context:
            bags = jagged_by_key[context_key(column)]
            tensors[values_name(context_key(column))] = bags.values()
            tensors[lengths_name(context_key(column))] = bags.lengths()
        return tensors

    def _candidate_tensors(
        self, jagged_by_key: dict[str, JaggedTensor], order: Tensor, counts: Tensor
    ) -> Inputs:
        """Candidates in an order that groups them by request, ``counts`` of each."""
        key = candidate_key(ITEM)
        tensors = {key: padded(jagged_by_key[key].values()[order], counts)}
        for column in self.schema.item_attributes:
            key = candidate_key(column)
            bags = jagged_by_key[key]
            ids = padded(bags.values(), bags.lengths())[order]
            tensors[values_name(key)] = ids[ids != NO_ID]
            tensors[lengths_name(key)] = padded(bags.lengths()[order], counts, 0)
        return tensors

    def _event_tensors(self, jagged_by_key: dict[str, JaggedTensor]) -> Inputs:
        tensors = {}
        for history in self.schema.histories:
            for column in self.schema.event_columns:
                key = history_key(history.name, column)
                tensors[key] = padded(jagged_by_key[key].values(), jagged_by_key[key].lengths())
            lengths = jagged_by_key[history_key(history.name, ITEM)].lengths()
            if self.spec.has_positions:
                first_key = history_key(history.name, FIRST_PLACE)
                first = torch.zeros_like(lengths)
                if first_key in jagged_by_key:
                    first = jagged_by_key[first_key].values()
                tensors[history_key(history.name, POSITION)] = numbers_from(first, lengths)
            for column in self.schema.item_attributes:
                key = history_key(history.name, column)
                tensors[values_name(key)] = jagged_by_key[key].values()
                tensors[lengths_name(key)] = padded(jagged_by_key[key].lengths(), lengths, 0)
        return tensors

    def _num_rows(self, jagged_by_key: dict[str, JaggedTensor], place: int) -> Tensor:
        """Rows of K/V [histories] of one of the towers."""
        time = jagged_by_key[history_key(self.schema.histories[place].name, TIME)]
        num_rows = self.encoders[place].num_rows
        return torch.tensor([num_rows(length) for length in time.lengths().tolist()])


def padded(values: Tensor, lengths: Tensor, filling: int = NO_ID) -> Tensor:
    """Rows of values [T, ...] as [B, longest, ...], at least one wide.

    Example:
        >>> padded(torch.tensor([3, 9, 4]), torch.tensor([2, 0, 1]))
        tensor([[ 3,  9],
                [-1, -1],
                [ 4, -1]])
    """
    if lengths.numel() == 1 and values.size(0):
        return values.unsqueeze(0)
    width = max(1, int(lengths.max())) if lengths.numel() else 1
    return JaggedTensor(values, lengths=lengths).to_padded_dense(width, float(filling))


def numbers_from(first: Tensor, lengths: Tensor) -> Tensor:
    """As many numbers as each of the lengths [B] says, from each first on, padded.

    Example:
        >>> numbers_from(torch.tensor([5, 0]), torch.tensor([1, 2]))
        tensor([[ 5, -1],
                [ 0,  1]])
    """
    place = torch.arange(max(1, int(lengths.max())))
    return (first.unsqueeze(1) + place).masked_fill(place >= lengths.unsqueeze(1), NO_ID)


def rows_of_pages(pages: JaggedTensor, page_size: int, num_rows: Tensor) -> Tensor:
    """Where each user's rows [B] are in a table of pages end to end: [B, longest], padded."""
    first = padded(pages.values(), pages.lengths()) * page_size
    rows = (first.unsqueeze(2) + torch.arange(page_size)).flatten(1)
    place = torch.arange(max(1, int(num_rows.max())))
    return rows[:, : place.numel()].masked_fill(place >= num_rows.unsqueeze(1), NO_ID)


def _kv_tensors(history: str, kv: Tensor, rows: Tensor) -> Inputs:
    if kv.size(1) == 0:  # Nobody has rows; the graph reads one and hides it.
        kv = kv.new_zeros([kv.size(0), 1, *kv.shape[2:]])
    return {history_key(history, KV): kv.contiguous(), history_key(history, ROWS): rows}
