"""Schemas of ``configs/``: one dataclass per pipeline, and one per kind of data.

A composed config is merged into its schema, so a key that no schema has is an error that names it,
and a value of the wrong type is too. Behind ``checked`` there are plain dataclasses: no DictConfig
travels on.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from torchrec_kvshare.errors import ConfigError

Schema = TypeVar("Schema")

TINY = 1e-12  # the least of what must be above 0

# The least value that can work, wherever a config has a number, or a list of them, by this name.
LEAST_BY_KEY = {
    **dict.fromkeys(("threads", "dim", "num_layers", "num_heads", "batch_targets", "negatives"), 1),
    **dict.fromkeys(("max_users", "eval_users", "max_history", "block", "merge", "top_mlp"), 1),
    **dict.fromkeys(("candidate_tokens", "num_tokens", "recent", "epochs"), 1),
    **dict.fromkeys(("seed", "weight_decay", "dropout", "checkpoint_seconds"), 0),
    **dict.fromkeys(("learning_rate", "table_learning_rate"), TINY),
    **dict.fromkeys(("positive_rating", "min_events", "items", "num_globals"), 0),
    **dict.fromkeys(("num_users", "events_per_user", "num_items", "num_categories"), 1),
    **dict.fromkeys(("count", "candidates", "requests", "users", "rounds"), 1),
    **dict.fromkeys(("histories", "long_histories", "merged_chunk_rows", "history_length"), 1),
    **dict.fromkeys(("merged_max_candidates", "repeats"), 1),
    **dict.fromkeys(("page_size", "queue_length", "queue_bytes", "max_failures"), 1),
    **dict.fromkeys(("capacity_bytes", "pinned_bytes", "wait_ms", "pause_ms"), 0),
    **dict.fromkeys(("watermark", "ttl_s", "idle_ttl_s", "deadline_ms"), TINY),
    **dict.fromkeys(("max_auc_change", "max_top10_loss", "max_score_difference"), 0),
    **dict.fromkeys(("max_request_bytes", "max_requests", "max_candidates", "max_events"), 1),
    **dict.fromkeys(("batch_requests", "batch_candidates", "batch_events", "queue_requests"), 1),
    **dict.fromkeys(("max_streams", "stream_depth", "hot_users", "hot_bytes", "max_values"), 1),
    **dict.fromkeys(("max_json_values", "max_connections", "max_calls", "max_inflight_bytes"), 1),
    **dict.fromkeys(("header_timeout_s", "body_timeout_s", "idle_timeout_s"), 1e-3),
    "memory_bytes": 1,
    **dict.fromkeys(("max_wait_ms", "shadow_share", "shadow_limit", "drain_s"), 0),
    **dict.fromkeys(("http_port", "grpc_port"), 0),
    **dict.fromkeys(("replicas", "redis_bytes", "replica_port"), 1),
    **dict.fromkeys(("timeout_ms", "stream_timeout_s", "poll_s"), 1e-3),
}
# And the greatest; where there is none, all but infinity can work.
MOST_BY_KEY = {
    "dropout": 0.99,
    "threads": 1024,
    "seed": 2**63 - 1,
    **dict.fromkeys(("watermark", "shadow_share", "max_top10_loss", "max_auc_change"), 1),
    **dict.fromkeys(("shadow_limit", "max_score_difference"), 1),
    **dict.fromkeys(("http_port", "grpc_port", "replica_port"), 65_535),
}

# Names of files, folders and hosts: an empty one is a variable of a shell that was not set.
NOT_EMPTY = (
    *("output", "run", "artifact", "requests", "models", "root", "path", "tensorboard", "folder"),
    *("url", "key_file", "password_file", "token_file", "tls_ca_file", "tls_cert_file"),
    *("tls_key_file", "tls_client_ca_file", "artifact_key_file", "host"),
)
REFUSE, SORT = "refuse", "sort"
# Words that are allowed, wherever a config has a key by this name.
WORDS_BY_KEY = {"history_order": (REFUSE, SORT)}


@dataclass
class SyntheticData:
    """The seeded world: no files."""

    name: str = "synthetic"
    num_users: int = 600
    events_per_user: int = 160  # mean
    num_items: int = 1000
    num_categories: int = 40
    seed: int = 0


@dataclass
class Format:
    """How a log's file is written."""

    delimiter: str | None = None  # one character, or \\t; None: told by the file's ending
    quoting: str | None = None  # double|none; None: none where tabs are between the fields
    encoding: str = "utf-8"
    header: list[str] = field(default_factory=list)  # the columns' names; []: in the first row
    missing: list[str] = field(  # texts that mean no value
        default_factory=lambda: ["NULL", "null", r"\N", "nan", "NaN", "None", "<NA>"]
    )


@dataclass
class OnlineRetailData:
    """UCI Online Retail or II: ``online_retail.csv(.gz)``, ``online_retail_II.csv(.gz)``."""

    name: str = "online_retail"
    root: str = MISSING
    format: Format = field(default_factory=Format)


@dataclass
class MovieLensData:
    """MovieLens in the layout of ``root``: latest-small, 1M, 20M or 25M."""

    name: str = "movielens"
    root: str = MISSING
    positive_rating: float = 4.0


@dataclass
class Columns:
    """Names in an interaction log's file."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "time"
    time_unit: str = "auto"  # of numbers: auto|s|ms|us|ns
    time_format: str | None = None  # of strptime
    action: str | None = None
    item_attributes: list[str] = field(default_factory=list)
    item_floats: list[str] = field(default_factory=list)
    user_attributes: list[str] = field(default_factory=list)
    list_separator: str = "|"


@dataclass
class InteractionsData:
    """Any interaction log: CSV, TSV or Parquet at ``path``."""

    name: str = "interactions"
    path: str = MISSING
    format: Format = field(default_factory=Format)
    columns: Columns = field(default_factory=Columns)
    label: str | None = None  # such as "rating>=8"; without it every row is positive


DATA_SCHEMAS = {
    schema().name: schema
    for schema in (SyntheticData, OnlineRetailData, MovieLensData, InteractionsData)
}
DataConfig = SyntheticData | OnlineRetailData | MovieLensData | InteractionsData


@dataclass
class ModelConfig:
    """Sizes of the DLRM and of its history towers."""

    history: str = "causal"  # kind of encoder, or none: the plain DLRM
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    dropout: float = 0.1
    top_mlp: list[int] = field(default_factory=lambda: [64, 1])  # widths; the last is the logit's
    max_history: int = 256  # events read, or seen by each layer where the window is sliding
    block: int = 64  # events between two places where a window may start
    window: str = "anchored"  # or sliding
    candidate_tokens: int = 1  # or 1 + number of item attributes: each a token of its own
    merge: int = 8  # longer: events in a group
    recent: int = 128  # longer: newest events whose groups go on to deeper layers
    num_globals: int = 4  # longer: learned rows that see the whole history
    # Actions of each history's events; none named: all events.
    histories: dict[str, list[str]] = field(default_factory=lambda: {"history": []})


@dataclass
class Budget:
    """How long training may take."""

    name: str = "demo"
    epochs: int = 3
    max_users: int | None = None  # train on that many users only
    eval_users: int | None = None  # rank the catalogue for that many users only
    baselines: bool = True  # also train history=none and count popularity


@dataclass
class TrainConfig:
    """``python -m pipelines.train``."""

    output: str = MISSING
    data: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    threads: int | None = None  # None: as many as the cores granted
    learning_rate: float = 3e-3  # of the dense parts
    table_learning_rate: float = 5e-3
    weight_decay: float = 1e-5  # of the dense parts
    batch_targets: int = 256  # targets, each with its negatives
    negatives: int = 7  # sampled for every target
    checkpoint_seconds: float = 60.0


@dataclass
class ExportConfig:
    """``python -m pipelines.export``."""

    run: str = MISSING  # output of pipelines.train
    output: str = MISSING
    target: str = "torchscript"  # torchscript|pt2|triton
    tables: str = "float32"  # float32|float16|int8|int4
    deterministic: bool = False  # each row of a linear layer computed as if it were alone
    name: str = "kvshare"  # of the models in a Triton repository
    licence: str = ""  # of the model, for the manifest
    artifact_key_file: str | None = None  # a secret that signs the manifest
    threads: int | None = None


@dataclass
class AuditConfig:
    """``python -m pipelines.audit``."""

    run: str = MISSING  # output of pipelines.train
    output: str = MISSING
    seed: int = 0
    threads: int | None = None


@dataclass
class HostConfig:
    """The tier in this process's memory: it takes what leaves the device."""

    capacity_bytes: int = 0  # 0: no such tier
    codec: str = "float32"
    min_events: int | None = None  # None: as the artifact's manifest has measured it, or 0


@dataclass
class DiskConfig:
    """The tier on a local disk: it gets what is encoded, and survives a restart."""

    folder: str | None = None  # None: no such tier
    capacity_bytes: int = 4 * 2**30
    codec: str = "float32"
    min_events: int | None = None
    deadline_ms: float = 50.0  # of a look-up


@dataclass
class RemoteConfig:
    """The tier in Redis or Valkey, shared by processes: it gets what is encoded."""

    url: str | None = None  # redis://host:port, rediss:// with TLS; None: no such tier
    cluster: bool = False
    username: str | None = None
    password_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    codec: str = "float32"
    min_events: int | None = None
    deadline_ms: float = 50.0


@dataclass
class CacheConfig:
    """Where K/V is kept between requests, and for how long."""

    name: str = "memory"  # or tiered: the tiers below too; or off
    capacity_bytes: int = 256 * 2**20  # on the device; histories share them by the size of theirs
    watermark: float = 0.9  # share of them that K/V at rest may take
    page_size: int = 32  # rows of K/V
    policy: str = "lru"  # or tiny_lfu
    share: str = "user"  # or content: K/V of equal histories is shared between users
    ttl_s: float = 300.0  # after so long K/V is encoded anew
    idle_ttl_s: float = 300.0  # or after so long without use
    pinned_bytes: int = 0  # of the capacity, for pinned users
    min_events: int = 0  # requests with fewer are not kept
    context: list[str] = field(default_factory=list)  # context columns that history rows read
    items: int = 0  # projected candidates kept; 0: none
    wait_ms: float = 1000.0  # for another request that encodes the same history
    second_touch: bool = False  # disk and remote get a user's K/V from its second time on
    key_file: str | None = None  # secret that signs what is written to disk and remote
    queue_length: int = 64  # writes that wait, for each tier
    queue_bytes: int = 32 * 2**20
    max_failures: int = 3  # in a row, until a tier is left alone
    pause_ms: float = 1000.0  # until it is tried again
    max_auc_change: float = 5e-4  # of a codec, as scenario=codec measured it
    max_top10_loss: float = 0.01  # share of the exact top 10 that is not in the codec's
    max_score_difference: float = 0.05  # of a probability
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)


@dataclass
class ScoreConfig:
    """``python -m pipelines.score``."""

    artifact: str = MISSING
    artifact_key_file: str | None = None  # a secret that it must be signed with
    requests: str = MISSING
    output: str = MISSING
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch_requests: int = 8  # scored together
    history_order: str = REFUSE  # a history that is not oldest first, or sort it
    deterministic: bool = False  # scores bit-equal whatever else is scored, or no start
    tensorboard: str | None = None  # folder for what the cache counted
    threads: int | None = None


@dataclass
class ServerConfig:
    """Where the server listens, whom it answers, and what it may be asked."""

    host: str = "127.0.0.1"
    http_port: int = 8000  # 0: any that is free
    grpc_port: int = 8001
    tls_cert_file: str | None = None  # with the key: TLS on both ports
    tls_key_file: str | None = None
    tls_client_ca_file: str | None = None  # clients need a certificate that it signed
    token_file: str | None = None  # a secret that callers say as a bearer token
    peers: list[str] = field(default_factory=list)  # host:port of all replicas, to forget users
    max_connections: int = 512  # of each face; more are closed
    max_calls: int = 256  # over gRPC, that are read or answered at once; more are refused
    max_request_bytes: int = 16 * 2**20
    max_json_values: int = 2**19  # of a JSON message; while they are read nobody is answered
    max_inflight_bytes: int = 64 * 2**20  # of all messages that are read or answered
    header_timeout_s: float = 10.0  # from a connection or a request's first byte to its headers
    body_timeout_s: float = 30.0  # for a message to come, and for an answer to be read
    idle_timeout_s: float = 90.0  # of a connection, or a gRPC stream, without a message
    max_requests: int = 64  # in one message
    max_candidates: int = 10_000  # of a request
    max_events: int = 20_000  # of a request's history, before it is cut to the window
    max_values: int = 200_000  # ids in one multi-valued column
    history_order: str = REFUSE  # a history that is not oldest first, or sort it
    timeout_ms: float = 1000.0  # of a request that says none, and the most that one may say
    batch_requests: int = 16  # scored in one step
    batch_candidates: int = 2048  # in one step; a request gets half of it at most
    batch_events: int = 8192  # encoded in one step, if more than one request needs it
    max_wait_ms: float = 0.0  # for a step to fill; while one is scored the next fills anyhow
    queue_requests: int = 256  # that wait; more are refused
    max_streams: int = 64  # open at once; more are refused
    stream_depth: int = 4  # groups of a stream that wait; the client is not read on then
    stream_timeout_s: float = 30.0
    poll_s: float = 1.0  # between two looks at a watched folder of models
    hot_users: int = 64  # a new version starts with the K/V of those that ask most
    memory_bytes: int | None = None  # of the process; None: as the machine or its cgroup grants
    hot_bytes: int = 32 * 2**20  # for the last requests of those users, of each model
    shadow_share: float = 0.001  # of cached answers that are scored again without the cache
    shadow_limit: float = 1e-4  # of a probability; beyond it the cache is left alone
    drain_s: float = 30.0  # for requests that were accepted before the server stops
    log_requests: bool = True  # a JSON line for each
    tensorboard: str | None = None  # folder for what is counted


@dataclass
class ServeConfig:
    """``python -m pipelines.serve``."""

    artifact: str | None = None  # of pipelines.export, served as model kvshare
    models: str | None = None  # or a watched folder: <name>/<version>/ are artifacts
    artifact_key_file: str | None = None  # a secret that artifacts must be signed with
    cache: CacheConfig = field(default_factory=CacheConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    deterministic: bool = False
    threads: int | None = None


@dataclass
class ServeClusterConfig(ServeConfig):
    """``python -m pipelines.serve_cluster``: what a replica takes, and how many there are.

    ``server.host``, ``server.http_port``, ``server.grpc_port`` and ``server.tls_*`` are nginx's, to
    which clients come; replicas speak plain text on ports of this machine alone.
    """

    output: str = MISSING  # configs, secrets and logs
    replicas: int = 3
    replica_port: int | None = None  # of the first; theirs follow one another. None: free ones
    redis_bytes: int = 2**30  # of the Redis that is started if cache.remote.url is null
    access_log: bool = False  # of nginx, a JSON line for each request
    run: bool = True  # false: write these and say what would run


@dataclass
class MakeRequestsConfig:
    """``python -m pipelines.make_requests``."""

    output: str = MISSING
    data: Any = MISSING
    count: int = 200
    candidates: int = 100
    seed: int = 0


@dataclass
class DemoConfig:
    """``python -m pipelines.demo``: train, export, score cached and uncached, compare."""

    output: str = MISSING
    data: Any = MISSING
    budget: Budget = field(default_factory=Budget)
    requests: int = 200
    candidates: int = 500
    seed: int = 0
    threads: int | None = None


@dataclass
class BenchmarkConfig:
    """``python -m pipelines.benchmark``."""

    output: str = MISSING
    scenario: str = "queue_length"  # a name in configs/scenario
    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events, all paths
    long_histories: list[int] = field(default_factory=lambda: [4096])  # events, shared paths only
    candidates: list[int] = field(default_factory=lambda: [1, 5, 10, 50, 100, 256, 500, 1000])
    merged_max_candidates: int = 1000  # beyond them the uncached baseline is not measured
    merged_chunk_rows: list[int] = field(
        default_factory=lambda: [2048, 8192, 32768]
    )  # fastest taken
    dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    encoders: list[str] = field(default_factory=lambda: ["causal"])
    num_tokens: int = 1  # of one candidate
    page_size: int = 32  # rows of K/V
    artifact: str | None = None  # of pipelines.export, where a scenario measures a trained model
    artifact_key_file: str | None = None  # a secret that it must be signed with
    run: str | None = None  # of pipelines.train, likewise
    data: Any = MISSING  # what its requests are made of
    requests: int = 500  # how many
    repeats: int = 5
    seed: int = 0
    threads: int | None = None


@dataclass
class ProfileConfig:
    """``python -m pipelines.profile_scoring``."""

    output: str = MISSING
    history_length: int = 1000  # events
    candidates: int = 500
    users: int = 8
    rounds: int = 10  # each user is scored once a round
    dim: int = 128
    num_layers: int = 2
    num_heads: int = 4
    page_size: int = 32
    seed: int = 0
    threads: int | None = None


# Pipelines whose output is a file; of the others it is a folder.
FILE_OUTPUTS = (ScoreConfig, MakeRequestsConfig)


def literal_overrides(arguments: list[str]) -> list[str]:
    """Quote what Hydra's grammar cannot read: a shell has taken the quotes off already.

    Args:
        arguments: of the command line.

    Returns:
        The same arguments, an unreadable ``key=value`` as ``key='value'``.

    Example:
        >>> literal_overrides(["data.label=rating>=4", "threads=1", "--help"])
        ["data.label='rating>=4'", 'threads=1', '--help']
    """
    return [_literal(argument) for argument in arguments]


def _literal(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if argument.startswith("-") or not equals:
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return argument


def checked(config: DictConfig, schema: type[Schema]) -> Schema:
    """A composed config as its dataclass.

    Args:
        config: as Hydra composed it.
        schema: the dataclass it must fit.

    Returns:
        An instance of ``schema``; ``data`` is the dataclass of its kind.

    Raises:
        ConfigError: naming the key that is unknown, missing, empty, of the wrong type or out of its
            range.
    """
    prefix = ""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        if "data" in merged:
            data_schema = _data_schema(merged.data)
            prefix = "data."
            data = OmegaConf.merge(OmegaConf.structured(data_schema), merged.data)
            prefix = ""
            merged.data = data
        filled = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_told(error, prefix)) from error
    assert isinstance(filled, schema)
    _check_values(filled, "")
    return filled


def _told(error: OmegaConfBaseException, prefix: str) -> str:
    """OmegaConf's message in one line, the key first."""
    key = f"{prefix}{error.full_key}".rstrip(".") or "the config"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing; say {key}=…"
    if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
        names = [one.name for one in fields(error.object_type)]
        near = get_close_matches(str(error.key), names, 1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        return f"{key} is no key of this config; {known}"
    return f"{key}: {str(error).splitlines()[0]}"


def _check_values(config: Any, prefix: str) -> None:
    for key, value in vars(config).items():
        name = f"{prefix}{key}"
        if is_dataclass(value):
            _check_values(value, f"{name}.")
        elif key in NOT_EMPTY and isinstance(value, str) and not value.strip():
            raise ConfigError(f"{name} is empty; say {name}=…, or leave it out")
        elif key in WORDS_BY_KEY and value not in WORDS_BY_KEY[key]:
            raise ConfigError(f"{name} is {value!r}; one of {WORDS_BY_KEY[key]} is allowed")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(name, value, number, key)


def _check_number(name: str, value: Any, number: float, key: str) -> None:
    # Not `number < least`: NaN is out of every range.
    least, most = LEAST_BY_KEY[key], MOST_BY_KEY.get(key)
    each = "each" if isinstance(value, list) else "it"
    if not number >= least:
        raise ConfigError(f"{name} is {value}; {each} must be at least {least}")
    if most is not None and not number <= most:
        raise ConfigError(f"{name} is {value}; {each} must be at most {most}")
    if number == float("inf"):
        raise ConfigError(f"{name} is {value}; {each} must be finite")


def _data_schema(data: DictConfig) -> type[Any]:
    if data.get("name") not in DATA_SCHEMAS:
        raise ConfigError(
            f"data.name is {data.get('name')!r}; one of {sorted(DATA_SCHEMAS)} is allowed"
        )
    return DATA_SCHEMAS[data.name]
