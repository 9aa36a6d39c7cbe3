"""The configuration of an nginx in front of replicas: a user's requests go to one of them.

Which one is consistent hashing's choice, on what the client says in ``X-User-Id`` (gRPC metadata:
``x-user-id``). The header picks a replica and grants nothing: a false one costs its sender the K/V
that is already there. A replica that dies costs its users a prefill, never an answer: scoring is
idempotent, so whatever it had not answered is asked of the next. Works with nginx 1.22 and above.
"""

import ipaddress
import json
from collections.abc import Sequence
from typing import NamedTuple

from torchrec_kvshare.errors import ConfigError

# Of one request, each at another replica: one that kills whoever reads it goes no further.
TRIES = 3  # those of gRPC are spelt out below
CONNECT_S = 1.0
# After one failure a replica is left alone for so long, then a request tries it again.
PAUSE_S = 1
STREAM_IDLE_S = 600.0  # an open stream may be silent for so long
KEPT = "keepalive 64;  # idle connections, for every worker"
# gRPC servers cancel a call that comes while they close; one that no longer listens gets none.
ANEW = "# A connection for each call: who has stopped listening gets no more of them."
SERVICE = "inference.GRPCInferenceService"
# What only one replica's own face can tell; a front would show any of them by turns.
OF_ONE_REPLICA = ("/", "/metrics", "/v1/state")
FORBIDDEN = set("\"'\\$;{}\n\r\t")  # in a path: nginx would read more than a path


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


class Limits(NamedTuple):
    """What bounds a request, and the whole of them."""

    body_bytes: int = 16 * 2**20
    timeout_s: float = 10.0  # for a replica's answer, before the next one is asked
    drain_s: float = 30.0  # for open requests and streams once nginx was told to quit
    connections: int = 4096  # of clients and replicas, for every worker


def nginx_config(
    front: Address,
    replicas: Sequence[Address],
    limits: Limits,
    tls: Tls | None = None,
    access_log: str | None = None,
) -> str:
    """The text of ``nginx.conf``, for an nginx whose prefix (``-p``) is a folder it may write to.

    The two faces hash apart: who asks over both may have K/V on two replicas.

    Args:
        front: where clients come.
        replicas: host names are resolved once, when nginx starts.
        limits: for every request.
        tls: for both faces; without it they speak plain text.
        access_log: a file, in the prefix unless absolute, for a JSON object a request.

    Raises:
        ConfigError: if there is no replica, or a path has characters that nginx reads as its own.

    Example:
        >>> front, replica = Address("0.0.0.0", 80, 81), Address("kvshare-0", 8000, 8001)
        >>> config = nginx_config(front, [replica], Limits())
        >>> [line.strip() for line in config.splitlines() if "listen " in line]
        ['listen 0.0.0.0:80;', 'listen 0.0.0.0:81 http2;']
    """
    if not replicas:
        raise ConfigError("there are 0 replicas; nginx needs at least 1")
    for path in filter(None, (*(tls or ()), access_log)):
        _check_path(path)
    blocks = [
        _process(limits),
        "http {",
        _everyone(limits, access_log),
        _upstream("http_replicas", [(one.host, one.http_port) for one in replicas], KEPT),
        _upstream("grpc_replicas", [(one.host, one.grpc_port) for one in replicas], ANEW),
        _http_server(_listen(front.host, front.http_port, tls), limits),
        _grpc_server(_listen(front.host, front.grpc_port, tls, " http2"), limits),
        "}\n",
    ]
    return "\n".join(blocks)


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


def _process(limits: Limits) -> str:
    return f"""\
# Written by torchrec_kvshare/serving/nginx.py: a change made here is lost at the next start.
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


def _everyone(limits: Limits, access_log: str | None) -> str:
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
    client_body_buffer_size 1m;
    client_header_timeout 10s;
    client_body_timeout 30s;
    send_timeout 30s;

    # Requests that do not say whose they are go to anyone.
    map $http_x_user_id $user_key {{
        "" $request_id;
        default $http_x_user_id;
    }}
"""


def _upstream(name: str, addresses: Sequence[tuple[str, int]], connections: str) -> str:
    rule = f"max_fails=1 fail_timeout={PAUSE_S}s"
    servers = "\n".join(f"        server {host_port(*address)} {rule};" for address in addresses)
    return f"""\
    upstream {name} {{
        zone {name} 256k;
        hash $user_key consistent;
{servers}
        {connections}
    }}
"""


def _http_server(listen: str, limits: Limits) -> str:
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
        error_page 413 @too_large;
        error_page 502 504 =503 @unavailable;

        location / {{
            proxy_pass http://http_replicas;
        }}
        location = /v1/rank {{
            if ($arg_stream = "1") {{
                rewrite ^ /v1/rank/stream last;
            }}
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
{_json_error("@too_large", 413, "RequestError", f"the limit is {limits.body_bytes} bytes")}
{_json_error("@unavailable", 503, "UnavailableError", "no replica has answered")}
    }}
"""


def _grpc_server(listen: str, limits: Limits) -> str:
    return f"""\
    server {{
{listen}
        http2_max_concurrent_streams 1024;
        keepalive_requests 1000000;  # of one connection: a client makes a single one for all calls
        grpc_set_header X-Forwarded-For $remote_addr;
{_timeouts("grpc", limits)}
        grpc_buffer_size 64k;
        # Not grpc_next_upstream: it would send on the frames that were made for the replica before,
        # less what that one had already taken.
        grpc_next_upstream off;
        recursive_error_pages on;
        location / {{
            # nginx passes gRPC on as it comes and could not ask again. What is mirrored is read to
            # its end first; the mirror itself is thrown away.
            mirror /buffered;
            error_page 413 = @too_large;
            error_page 502 503 504 = @second;
            grpc_pass grpc://grpc_replicas;
        }}
        location @second {{
            error_page 502 503 504 = @third;
            grpc_pass grpc://grpc_replicas;
        }}
        location @third {{
            grpc_pass grpc://grpc_replicas;
        }}
        location = /{SERVICE}/ModelStreamInfer {{
            grpc_read_timeout {_ms(STREAM_IDLE_S)};
            grpc_send_timeout {_ms(STREAM_IDLE_S)};
            client_body_timeout {_ms(STREAM_IDLE_S)};
            client_max_body_size 0;  # the replica limits each message
            # As for the stream above: only a replica that cannot be reached is replaced.
            grpc_next_upstream error timeout non_idempotent;
            grpc_next_upstream_tries {TRIES};
            grpc_pass grpc://grpc_replicas;
        }}
        # gRPC has its own words for it; of 502, 503 and 504 its clients make UNAVAILABLE.
        location @too_large {{
            default_type application/grpc;
            add_header grpc-status 8 always;
            add_header grpc-message "the limit is {limits.body_bytes} bytes" always;
            return 204;
        }}
        location = /buffered {{ internal; return 204; }}
    }}
"""


def _timeouts(module: str, limits: Limits) -> str:
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
    body = json.dumps({"request_id": None, "error": {"type": kind, "message": message}})
    return f"""\
        location {name} {{
            default_type application/json;
            return {status} '{body}';
        }}"""


def _check_path(path: str) -> None:
    found = sorted(FORBIDDEN & set(path))
    if found:
        raise ConfigError(f"the path {path!r} has {found}; nginx reads {sorted(FORBIDDEN)} itself")


def _ms(seconds: float) -> str:
    return f"{round(1000 * seconds)}ms"
