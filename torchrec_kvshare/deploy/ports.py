"""Ports of this machine: find a free one, and check that a server answers on one."""

import random
import socket
from errno import EADDRINUSE

HERE = "127.0.0.1"
# Below the kernel's ports for clients: a client could take the port of a server that died.
PORTS = range(10_000, 30_000)
PROBE_S = 1.0  # for an answer to one probe


def free_port() -> int:
    """Return a port that is free now, and that the kernel gives to no client."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise
            else:
                return port


def is_listening(host: str, port: int) -> bool:
    """Whether a server accepts connections there."""
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except OSError:
        return False
    return True


def redis_answers(port: int, password: bytes | None = None) -> bool:
    """Whether a Redis on this machine answers PING on that port."""
    try:
        with socket.create_connection((HERE, port), PROBE_S) as connection:
            if password is not None:
                connection.sendall(b"AUTH " + password + b"\r\n")
                if not connection.recv(16).startswith(b"+OK"):
                    return False
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
