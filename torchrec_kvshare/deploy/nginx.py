"""The configuration of an nginx in front of replicas: a user's requests go to one of them.

Which one is consistent hashing's choice, on what the client says in ``X-User-Id`` (gRPC metadata:
``x-user-id``). The header picks a replica and grants nothing: a false one costs its sender the K/V
that is already there. A replica that dies costs its users a prefill, never an answer: scoring is
idempotent, so whatever it had not answered is asked of the next, and of no third: a request that
kills replicas kills two. Works with nginx 1.22 and above.

What a client may take is bounded before anything of it is stored: the token is compared as soon as
the header has come, then requests in flight are counted, then bodies are limited.
"""

import grp
import ipaddress
import json
import os
import pwd
import re
from collections.abc import Sequence
from typing import NamedTuple

from torchrec_kvshare.errors import ConfigError

# Of one request, each at another replica; those of gRPC are spelt out below. nginx does not count
# a try that fails over a kept-alive connection, so none is kept to a replica (0.77 ms a request on
# loopback, 0.44 with kept ones); and who has stopped listening gets no more of them.
TRIES = 2
CONNECT_S = 1.0
# After one failure a replica is left alone for so long, then a request tries it again.
PAUSE_S = 1
STREAM_IDLE_S = 600.0  # an open stream may be silent for so long
BUFFER_BYTES = 2**18  # of a body in memory; a longer one is in a file until it has come
SERVICE, HEALTH_SERVICE = "inference.GRPCInferenceService", "grpc.health.v1.Health"
HEALTH = "/v2/health/"
GRPC_HEAD_BYTES = 5  # before each message
# What only one replica's own face can tell; a front would show any of them by turns.
OF_ONE_REPLICA = ("/", "/metrics", "/v1/state")
FORBIDDEN = set("\"'\\$;{}\n\r\t")  # in a path: nginx would read more than a path
PROGRAM, CONFIG_FILE, LOG_FILE = "nginx", "nginx.conf", "nginx.log"
WORKERS = ("www-data", "nginx", "nobody")  # the first of these users that there is
MAX_TOKEN_BYTES = 900  # a line of nginx's has 4096, of which a byte takes up to four
NO_TOKEN = "a bearer token is needed"


class Address(NamedTuple):
    """Where HTTP and gRPC are spoken."""

    host: str
    http_port: int
    grpc_port: int


class Tls(NamedTuple):
    """PEM files, paths absolute."""

    cert_file: str
    key_file: str
    client_ca_file: str | None = None  # clients need a certificate that it signed


class NginxLimits(NamedTuple):
    """What bounds a request, and the whole of them."""

    body_bytes: int = 16 * 2**20
    timeout_s: float = 10.0  # for a replica's answer, before the next one is asked
    drain_s: float = 30.0  # for open requests and streams once nginx was told to quit
    connections: int = 4096  # of clients and replicas, for every worker
    requests: int = 1024  # in flight, streams among them
    client_requests: int = 512  # of those, from one address


def nginx_config(
    front: Address,
    replicas: Sequence[Address],
    limits: NginxLimits,
    tls: Tls | None = None,
    access_log: str | None = None,
    token_file: str | None = None,
) -> str:
    """The text of ``nginx.conf``, for ``nginx_command`` in the folder that holds it.

    The two faces hash apart: who asks over both may have K/V on two replicas.

    Args:
        front: where clients come.
        replicas: host names are resolved once, when nginx starts.
        limits: for every request.
        tls: for both faces; without it they speak plain text.
        access_log: a file, in the folder unless absolute, for a JSON object a request.
        token_file: what ``token_config`` wrote, in the folder unless absolute: requests without the
            token are refused, but for those about health.

    Raises:
        ConfigError: if there is no replica, or a path has characters that nginx reads as its own.

    Example:
        >>> front, replica = Address("0.0.0.0", 80, 81), Address("kvshare-0", 8000, 8001)
        >>> config = nginx_config(front, [replica], NginxLimits())
        >>> [line.strip() for line in config.splitlines() if "listen " in line]
        ['listen 0.0.0.0:80;', 'listen 0.0.0.0:81 http2;']
    """
    if not replicas:
        raise ConfigError("there are 0 replicas; nginx needs at least 1")
    for path in filter(None, (*(tls or ()), access_log, token_file)):
        _check_path(path)
    blocks = [
        _process(limits),
        "http {",
        _everyone(limits, access_log),
        _token(token_file),
        _upstream("http_replicas", [(one.host, one.http_port) for one in replicas]),
        _upstream("grpc_replicas", [(one.host, one.grpc_port) for one in replicas]),
        _http_server(_listen(front.host, front.http_port, tls), limits),
        _grpc_server(_listen(front.host, front.grpc_port, tls, " http2"), limits),
        "}\n",
    ]
    return "\n".join(blocks)


def token_config(token: bytes) -> str:
    """The text of a file with which nginx knows the token; as secret as the token itself.

    Args:
        token: what callers say as a bearer token.

    Raises:
        ConfigError: if it is longer than nginx can read.

    Example:
        >>> print(token_config(b"s3.cret"), end="")
        map $http_authorization $has_token { default 0; "~^Bearer\\x20s3\\x2ecret\\z" 1; }
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise ConfigError(
            f"the token has {len(token)} bytes; nginx reads at most {MAX_TOKEN_BYTES}"
        )
    # An expression: nginx ignores the case of other texts, and limits their length.
    spelt = "".join(
        chr(one) if chr(one).isalnum() and one < 128 else f"\\x{one:02x}" for one in token
    )
    return f'map $http_authorization $has_token {{ default 0; "~^Bearer\\x20{spelt}\\z" 1; }}\n'


def nginx_command() -> list[str]:
    """What starts nginx in the folder that holds ``nginx.conf``; workers are never root's.

    Paths are relative to that folder, which other users must be able to pass through and no more:
    what lies above it, root's home for one, may be closed to the workers.

    Raises:
        ConfigError: if we are root, and there is no user for them.
    """
    command = [PROGRAM, "-p", "./", "-c", CONFIG_FILE, "-e", LOG_FILE]
    if os.geteuid() != 0:
        return command
    return [*command, "-g", f"user {_worker()};"]


def _worker() -> str:
    """User and group of nginx's workers."""
    for name in WORKERS:
        try:
            return f"{name} {grp.getgrgid(pwd.getpwnam(name).pw_gid).gr_name}"
        except KeyError:
            continue
    raise ConfigError(f"nginx is started by root and there is none of the users {WORKERS}")


def host_port(host: str, port: int) -> str:
    """Both in one word; an IPv6 address stands in brackets.

    Example:
        >>> host_port("::1", 8000), host_port("localhost", 8000)
        ('[::1]:8000', 'localhost:8000')
    """
    try:
        return f"[{ipaddress.IPv6Address(host)}]:{port}"
    except ValueError:
        return f"{host}:{port}"


def _process(limits: NginxLimits) -> str:
    return f"""\
# Written by torchrec_kvshare/deploy/nginx.py: a change made here is lost at the next start.
daemon off;
worker_processes auto;
# An open stream would keep a worker that shall end alive for ever.
worker_shutdown_timeout {_ms(limits.drain_s)};
pid nginx.pid;
error_log nginx.log warn;

events {{
    worker_connections {limits.connections};
}}
"""


def _everyone(limits: NginxLimits, access_log: str | None) -> str:
    fields = {
        "time": "$time_iso8601",
        "id": "$request_id",
        "method": "$request_method",
        "path": "$uri",
        "status": "$status",
        "seconds": "$request_time",
        "replicas": "$upstream_addr",  # more than one: it was asked again
        "replica_status": "$upstream_status",
    }
    log = f"{access_log} as_json" if access_log else "off"
    return f"""\
    server_tokens off;
    log_format as_json escape=json '{json.dumps(fields)}';
    access_log {log};

    # nginx makes the folders of modules that nobody uses as well.
    client_body_temp_path nginx_temp;
    proxy_temp_path nginx_temp;
    fastcgi_temp_path nginx_temp;
    uwsgi_temp_path nginx_temp;
    scgi_temp_path nginx_temp;

    client_max_body_size {limits.body_bytes};
    client_body_buffer_size {BUFFER_BYTES};
    client_header_timeout 10s;
    client_body_timeout 10s;  # between two pieces of it
    send_timeout 30s;

    limit_conn_zone all zone=all:32k;
    limit_conn_zone $binary_remote_addr zone=clients:1m;
    limit_conn all {limits.requests};
    limit_conn clients {limits.client_requests};
    limit_conn_status 429;
    limit_conn_log_level info;  # One line for each would fill the disk in its turn.

    # Requests that do not say whose they are go to anyone.
    map $http_x_user_id $user_key {{
        "" $request_id;
        default $http_x_user_id;
    }}
"""


def _token(token_file: str | None) -> str:
    include = "" if token_file is None else f'    include "{token_file}";\n'
    has_token = "1" if token_file is None else "$has_token"
    return f"""\
{include}\
    # Of a request without the token nothing more is read, but for the header.
    map "{has_token} $uri" $is_refused {{
        "~^1 " 0;
        "~^0 {HEALTH}" 0;
        "~^0 /{re.escape(HEALTH_SERVICE)}/" 0;
        default 1;
    }}
"""


def _upstream(name: str, addresses: Sequence[tuple[str, int]]) -> str:
    rule = f"max_fails=1 fail_timeout={PAUSE_S}s"
    servers = "\n".join(f"        server {host_port(*address)} {rule};" for address in addresses)
    return f"""\
    upstream {name} {{
        zone {name} 256k;
        hash $user_key consistent;
{servers}
    }}
"""


def _http_server(listen: str, limits: NginxLimits) -> str:
    refused = "\n".join(
        f"        location = {path} {{ error_page 404 = @of_one_replica; return 404; }}"
        for path in OF_ONE_REPLICA
    )
    return f"""\
    server {{
{listen}
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        # In place of what the client says: nobody in front of us is trusted.
        proxy_set_header X-Forwarded-For $remote_addr;
{_timeouts("proxy", limits)}
        # Not http_429: a request that one replica has no room for would take the next one's.
        proxy_next_upstream error timeout invalid_header http_502 http_503 non_idempotent;
        proxy_next_upstream_tries {TRIES};
        proxy_next_upstream_timeout {_ms(2 * limits.timeout_s)};
        proxy_buffer_size 16k;
        proxy_buffers 32 64k;
        proxy_max_temp_file_size 0;
        error_page 401 @no_token;
        error_page 413 @too_large;
        error_page 429 @too_many;
        error_page 502 504 =503 @unavailable;
        if ($is_refused) {{
            return 401;
        }}

        location / {{
            proxy_pass http://http_replicas;
        }}
        # Asked without a token: it has nothing to store.
        location {HEALTH} {{
            limit_conn clients {limits.client_requests};
            client_max_body_size 1;
            error_page 413 @no_body;
            error_page 429 @too_many;
            error_page 502 504 =503 @unavailable;
            proxy_pass http://http_replicas;
        }}
        location = /v1/rank {{
            if ($arg_stream = "1") {{
                rewrite ^ /v1/rank/stream last;
            }}
            proxy_pass http://http_replicas;
        }}
        location = /v1/forget {{
            # A 503 names the replicas that did not: whoever says so is well.
            proxy_next_upstream error non_idempotent;
            proxy_pass http://http_replicas;
        }}
        # Both ways at once. What has been passed on is nowhere kept, so only a replica that cannot
        # be reached at all is replaced: one that dies later ends the stream, and the client asks
        # again. A replica that answers before it has read all must go on reading: nginx does not
        # come back to a body that the replica's socket had no room for.
        location = /v1/rank/stream {{
            internal;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout {_ms(STREAM_IDLE_S)};
            client_body_timeout {_ms(STREAM_IDLE_S)};
            proxy_pass http://http_replicas/v1/rank;
        }}
{refused}
{_json_error("@of_one_replica", 404, "NotFound", "each replica tells of itself: ask it directly")}
{_json_error("@too_large", 413, "RequestError", f"server.max_request_bytes is {limits.body_bytes}")}
{_json_error("@no_body", 413, "RequestError", "a question about health has no body")}
{_json_error("@too_many", 429, "OverloadError", _too_many(limits))}
{_json_error("@unavailable", 503, "UnavailableError", "no replica has answered")}
        location @no_token {{
            default_type application/json;
            add_header WWW-Authenticate Bearer always;
            return 401 '{_json_text("RequestError", NO_TOKEN)}';
        }}
    }}
"""


def _grpc_server(listen: str, limits: NginxLimits) -> str:
    too_large = f"server.max_request_bytes is {limits.body_bytes}"
    return f"""\
    server {{
{listen}
        http2_max_concurrent_streams {limits.client_requests};
        keepalive_requests 1000000;  # of one connection: a client makes a single one for all calls
        client_max_body_size {limits.body_bytes + GRPC_HEAD_BYTES};
        grpc_set_header X-Forwarded-For $remote_addr;
{_timeouts("grpc", limits)}
        grpc_buffer_size 64k;
        # Not grpc_next_upstream: it would send on the frames that were made for the replica before,
        # less what that one had already taken.
        grpc_next_upstream off;
        error_page 401 = @no_token;
        error_page 413 = @too_large;
        error_page 429 = @too_many;
        if ($is_refused) {{
            return 401;
        }}
        location / {{
            # nginx passes gRPC on as it comes and could not ask again. What is mirrored is read to
            # its end first; the mirror itself is thrown away.
            mirror /buffered;
            error_page 413 = @too_large;  # Again: with one of its own it inherits none.
            error_page 429 = @too_many;
            error_page 502 503 504 = @second;
            grpc_pass grpc://grpc_replicas;
        }}
        location @second {{
            grpc_pass grpc://grpc_replicas;
        }}
        location = /{SERVICE}/ModelStreamInfer {{
            client_body_timeout {_ms(STREAM_IDLE_S)};
            client_max_body_size 0;  # the replica limits each message
{_grpc_stream()}
        }}
        location /{HEALTH_SERVICE}/ {{
            limit_conn clients {limits.client_requests};
{_grpc_stream()}
        }}
        # gRPC has its own words for it; of 502, 503 and 504 its clients make UNAVAILABLE.
{_grpc_error("@no_token", 16, NO_TOKEN)}
{_grpc_error("@too_large", 8, too_large)}
{_grpc_error("@too_many", 8, _too_many(limits))}
        location = /buffered {{ internal; return 204; }}
    }}
"""


def _grpc_stream() -> str:
    """Passed on as it comes, and nowhere kept: only a replica that is not reached is replaced."""
    return f"""\
            grpc_read_timeout {_ms(STREAM_IDLE_S)};
            grpc_send_timeout {_ms(STREAM_IDLE_S)};
            grpc_next_upstream error timeout non_idempotent;
            grpc_next_upstream_tries {TRIES};
            grpc_pass grpc://grpc_replicas;"""


def _timeouts(module: str, limits: NginxLimits) -> str:
    return f"""\
        {module}_connect_timeout {_ms(CONNECT_S)};
        {module}_send_timeout {_ms(limits.timeout_s)};
        {module}_read_timeout {_ms(limits.timeout_s)};"""


def _listen(host: str, port: int, tls: Tls | None, protocol: str = "") -> str:
    lines = [f"listen {host_port(host, port)}{' ssl' if tls else ''}{protocol};"]
    if tls:
        lines += [
            f'ssl_certificate "{tls.cert_file}";',
            f'ssl_certificate_key "{tls.key_file}";',
            "ssl_protocols TLSv1.2 TLSv1.3;",
            "ssl_session_cache shared:kvshare:1m;",
        ]
    if tls and tls.client_ca_file:
        lines += [f'ssl_client_certificate "{tls.client_ca_file}";', "ssl_verify_client on;"]
    return "\n".join(f"        {line}" for line in lines)


def _json_error(name: str, status: int, kind: str, message: str) -> str:
    return f"""\
        location {name} {{
            default_type application/json;
            return {status} '{_json_text(kind, message)}';
        }}"""


def _json_text(kind: str, message: str) -> str:
    return json.dumps({"request_id": None, "error": {"type": kind, "message": message}})


def _grpc_error(name: str, status: int, message: str) -> str:
    return f"""\
        location {name} {{
            default_type application/grpc;
            add_header grpc-status {status} always;
            add_header grpc-message "{message}" always;
            return 204;
        }}"""


def _too_many(limits: NginxLimits) -> str:
    num_all, num_own = limits.requests, limits.client_requests
    return f"{num_all} requests are in flight, or {num_own} of this address: no more are taken"


def _check_path(path: str) -> None:
    found = sorted(FORBIDDEN & set(path))
    if found:
        raise ConfigError(f"the path {path!r} has {found}; nginx reads {sorted(FORBIDDEN)} itself")


def _ms(seconds: float) -> str:
    return f"{round(1000 * seconds)}ms"
