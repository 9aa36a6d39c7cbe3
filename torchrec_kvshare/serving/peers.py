"""Replicas of one service: the one that is asked to forget, clear or pin asks all of them.

It asks in plain text, as the proxy in front of the replicas does, with the caller's token.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

import aiohttp

from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import ConfigError

LOCAL = "local"  # in the query: at this replica only
FORGOTTEN = "forgotten_bytes"  # in the answer, by tier
MAX_REASON = 300  # characters of a replica's error in a message
ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}", re.ASCII)


class Peers:
    """All replicas including this one; empty if the config names none.

    Args:
        config: addresses, and the timeout of one replica.

    Raises:
        ConfigError: if an address is malformed, or the replicas speak TLS.
    """

    def __init__(self, config: ServerConfig) -> None:
        for address in config.peers:
            if not ADDRESS.fullmatch(address):
                raise ConfigError(f"server.peers holds {address!r}; host:port is allowed")
        if config.peers and config.tls_cert_file is not None:
            raise ConfigError(
                "server.peers are asked in plain text, and server.tls_cert_file is set: TLS ends "
                "at the proxy in front of replicas"
            )
        self._addresses = config.peers
        self._timeout = aiohttp.ClientTimeout(config.timeout_ms / 1e3)

    def __bool__(self) -> bool:
        return bool(self._addresses)

    async def ask(
        self, action: str, message: Mapping[str, Any], result: str, authorization: str
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Ask every replica to do something.

        Args:
            action: last part of the path.
            message: as it came.
            result: key that the answers have.
            authorization: header of the caller.

        Returns:
            Answers by address, and reasons by address of the replicas that failed.
        """
        headers = {"Authorization": authorization}
        done, failed = {}, {}
        async with aiohttp.ClientSession(headers=headers, timeout=self._timeout) as session:
            asked = (
                _ask(session, f"http://{address}/v1/{action}?{LOCAL}=1", message, result)
                for address in self._addresses
            )
            answers = await asyncio.gather(*asked)
        for address, answer in zip(self._addresses, answers, strict=True):
            if isinstance(answer, str):
                failed[address] = answer
            else:
                done[address] = answer
        return done, failed


async def _ask(
    session: aiohttp.ClientSession, url: str, message: Mapping[str, Any], result: str
) -> dict[str, Any] | str:
    """Return a replica's answer, or why there is none."""
    try:
        async with session.post(url, json=message, allow_redirects=False) as response:
            body = await response.json()
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        return f"{type(error).__name__} {error}".strip()[:MAX_REASON]
    if response.status == 200 and isinstance(body, dict) and result in body:
        return body
    return f"status {response.status}, {json.dumps(body)[:MAX_REASON]}"
