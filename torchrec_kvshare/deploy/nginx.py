"""Write the nginx configuration in front of the replicas: each user stays with one replica.

nginx picks the replica by consistent hashing of the ``X-User-Id`` header (gRPC metadata
``x-user-id``). The header picks a replica and grants nothing: a false one costs its sender the K/V
that the right replica has. When a replica dies, its users pay a prefill and no request fails:
scoring is idempotent, so nginx sends an unanswered request to one other replica. It tries no third
one: a request that kills replicas kills two. Works with nginx 1.22 and above.

nginx checks limits before it stores a body: the token as soon as the header has arrived, then the
number of requests in flight, then the size. ``nginx.conf.template`` holds the text with ``%{name}``
for each value, as nginx's own variables begin with a dollar sign.
"""

import grp
import ipaddress
import os
import pwd
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from torchrec_kvshare.errors import ConfigError

TEMPLATE = Path(__file__).with_name("nginx.conf.template")
# Replicas that one request may visit; a gRPC call gets its second one from ``location @second``.
# nginx does not count a try that fails over a kept-alive connection, so no connection to a replica
# is kept alive (0.77 ms a request on loopback, 0.44 with keep-alive), and a replica that has
# stopped listening gets no more requests.
TRIES = 2
CONNECT_S = 1.0
PAUSE_S = 1  # how long a replica gets no requests after one failure
STREAM_IDLE_S = 600.0  # how long an open stream may be silent
BUFFER_BYTES = 2**18  # of a body in memory; nginx writes a longer one to a file until it is whole
GRPC_HEAD_BYTES = 5  # before each message
FORBIDDEN = set("\"'\\$;{}\n\r\t")  # in a path: nginx gives them a meaning of their own
PROGRAM, CONFIG_FILE, LOG_FILE = "nginx", "nginx.conf", "nginx.log"
WORKERS = ("www-data", "nginx", "nobody")  # users of the worker processes; the first that exists
MAX_TOKEN_BYTES = 900  # nginx reads lines of up to 4096 bytes; a byte of the token takes up to four


class Address(NamedTuple):
    """Host and ports of a server."""

    host: str
    http_port: int
    grpc_port: int


class Tls(NamedTuple):
    """Absolute paths of PEM files."""

    cert_file: str
    key_file: str
    client_ca_file: str | None = None  # clients need a certificate that it signed


class NginxLimits(NamedTuple):
    """Limits of one request, and of all requests together."""

    body_bytes: int = 16 * 2**20
    timeout_s: float = 10.0  # for a replica's answer, before nginx tries the next replica
    drain_s: float = 30.0  # for open requests and streams after nginx was told to quit
    connections: int = 4096  # to clients and replicas, of each worker
    requests: int = 1024  # in flight, streams included
    client_requests: int = 512  # of those, from one address


def nginx_config(
    front: Address,
    replicas: Sequence[Address],
    limits: NginxLimits,
    *,
    tls: Tls | None = None,
    access_log: str | None = None,
    token_file: str | None = None,
) -> str:
    """Return the text of ``nginx.conf``, for ``nginx_command`` in the folder that holds it.

    HTTP and gRPC are hashed separately: a user who calls both may have K/V on two replicas.

    Args:
        front: where nginx listens for clients.
        replicas: nginx resolves their host names once, when it starts.
        limits: of every request.
        tls: for HTTP and gRPC; None for plain text.
        access_log: a file that gets a JSON object per request, in the folder unless absolute.
        token_file: holds the text of ``token_config``, in the folder unless absolute: nginx refuses
            requests without the token, except health checks.

    Raises:
        ConfigError: if there is no replica, or a path has characters that nginx treats specially.

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
    lines_by_name = {
        "token_include": [] if token_file is None else [f'include "{token_file}";'],
        "http_servers": [_server(one.host, one.http_port) for one in replicas],
        "grpc_servers": [_server(one.host, one.grpc_port) for one in replicas],
        "http_listen": _listen(host_port(front.host, front.http_port), "", tls),
        "grpc_listen": _listen(host_port(front.host, front.grpc_port), " http2", tls),
    }
    value_by_name: dict[str, str | int] = {
        "access_log": f"{access_log} as_json" if access_log else "off",
        "body_bytes": limits.body_bytes,
        "buffer_bytes": BUFFER_BYTES,
        "client_requests": limits.client_requests,
        "connect_ms": _ms(CONNECT_S),
        "connections": limits.connections,
        "drain_ms": _ms(limits.drain_s),
        "grpc_body_bytes": limits.body_bytes + GRPC_HEAD_BYTES,
        "has_token": "1" if token_file is None else "$has_token",
        "requests": limits.requests,
        "retry_ms": _ms(TRIES * limits.timeout_s),
        "stream_idle_ms": _ms(STREAM_IDLE_S),
        "timeout_ms": _ms(limits.timeout_s),
        "tries": TRIES,
    }
    return _filled(TEMPLATE.read_text(), lines_by_name, value_by_name)


def token_config(token: bytes) -> str:
    """Return the text of a file from which nginx knows the token; as secret as the token itself.

    Args:
        token: the bearer token of callers.

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
    # A regular expression: nginx ignores case in plain keys of a map, and limits their length.
    escaped = "".join(
        chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in token
    )
    return f'map $http_authorization $has_token {{ default 0; "~^Bearer\\x20{escaped}\\z" 1; }}\n'


def nginx_command() -> list[str]:
    """Return the command that starts nginx in the folder of ``nginx.conf``, no worker as root.

    Paths are relative to that folder. Its mode must let other users pass through it, and no more;
    the folders above it, such as root's home, may be closed to the workers.

    Raises:
        ConfigError: if this process is root's and the machine has no user for the workers.
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
    raise ConfigError(f"nginx is started by root, and none of the users {WORKERS} exists")


def host_port(host: str, port: int) -> str:
    """Join host and port; an IPv6 address gets brackets.

    Example:
        >>> host_port("::1", 8000), host_port("localhost", 8000)
        ('[::1]:8000', 'localhost:8000')
    """
    try:
        return f"[{ipaddress.IPv6Address(host)}]:{port}"
    except ValueError:
        return f"{host}:{port}"


class _Template(Template):
    delimiter = "%"


def _filled(
    text: str,
    lines_by_name: Mapping[str, Sequence[str]],
    value_by_name: Mapping[str, str | int],
) -> str:
    """Fill a template; a placeholder that is alone on its line takes any number of lines."""

    def insert(found: re.Match[str]) -> str:
        indent, name = found.groups()
        lines = [f"{indent}{line}\n" for line in lines_by_name[name]]
        return "".join(lines).replace("%", "%%")

    text = re.sub(r"^( *)%\{(\w+)\}\n", insert, text, flags=re.MULTILINE)
    return _Template(text).substitute(value_by_name)


def _server(host: str, port: int) -> str:
    return f"server {host_port(host, port)} max_fails=1 fail_timeout={PAUSE_S}s;"


def _listen(address: str, protocol: str, tls: Tls | None) -> list[str]:
    if tls is None:
        return [f"listen {address}{protocol};"]
    lines = [
        f"listen {address} ssl{protocol};",
        f'ssl_certificate "{tls.cert_file}";',
        f'ssl_certificate_key "{tls.key_file}";',
        "ssl_protocols TLSv1.2 TLSv1.3;",
        "ssl_session_cache shared:kvshare:1m;",
    ]
    if tls.client_ca_file:
        lines += [f'ssl_client_certificate "{tls.client_ca_file}";', "ssl_verify_client on;"]
    return lines


def _check_path(path: str) -> None:
    found = sorted(FORBIDDEN & set(path))
    if found:
        raise ConfigError(
            f"the path {path!r} has {found}; nginx gives {sorted(FORBIDDEN)} a meaning of their own"
        )


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
