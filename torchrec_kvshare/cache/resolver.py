"""DNS look-ups within a deadline: the system's resolver has none."""

import socket
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError


class Resolver:
    """Resolves host names in threads; concurrent look-ups of one name share a thread.

    Args:
        timeout_s: of a look-up.

    Example:
        >>> Resolver(timeout_s=5.0).addresses("127.0.0.1")
        ['127.0.0.1']
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._known_by_host: dict[str, list[str]] = {}  # the last addresses of each name
        self._running_by_host: dict[str, Future[list[str]]] = {}
        self._lock = threading.Lock()

    def addresses(self, host: str) -> list[str]:
        """Return the addresses of a host, in the order in which to try them.

        If the resolver is late, these are the last addresses that it returned.

        Raises:
            OSError: if the host has no address, or none is known in time.
        """
        with self._lock:
            running = self._running_by_host.get(host)
            if running is None:
                running = self._running_by_host[host] = Future()
                work, name = (host, running), "kvshare-resolve"
                threading.Thread(target=self._look_up, args=work, name=name, daemon=True).start()
        try:
            return running.result(self._timeout_s)
        except FutureTimeoutError as error:
            if host in self._known_by_host:
                return self._known_by_host[host]
            raise OSError(f"{host} has no address after {self._timeout_s:g} s") from error

    def _look_up(self, host: str, running: "Future[list[str]]") -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
            self._known_by_host[host] = addresses
            running.set_result(addresses)
        except BaseException as error:
            running.set_exception(error)
        finally:
            with self._lock:
                del self._running_by_host[host]
