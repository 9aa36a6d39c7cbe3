"""The replicas of one service, each of which must forget a user: whichever is asked asks them all.

They are asked in plain text, as the proxy in front of them asks, and by the token that the caller
said.
"""

import asyncio
import json
import re
from typing import Any

import aiohttp

from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import USER

LOCAL = "local"  # in the query: only the replica that is asked
FORGOTTEN = "forgotten_bytes"  # in its answer, by tier
MAX_SHOWN = 300  # characters of what a replica says
ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}", re.ASCII)


class Peers:
    """All replicas, this one too; none where there is only this one.

    Args:
        config: names them, and how long each may take.

    Raises:
        ConfigError: if one is no address, or they are behind TLS.
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

    async def forget(
        self, user_id: str, authorization: str
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Let every replica forget a user.

        Args:
            user_id: as ``canonical_id`` spells it.
            authorization: the header that the caller said.

        Returns:
            By address what each has answered, and why each of the others has not.
        """
        headers = {"Authorization": authorization}
        done, failed = {}, {}
        async with aiohttp.ClientSession(headers=headers, timeout=self._timeout) as session:
            asked = (self._ask(session, address, user_id) for address in self._addresses)
            answers = await asyncio.gather(*asked)
        for address, answer in zip(self._addresses, answers, strict=True):
            if isinstance(answer, str):
                failed[address] = answer
            else:
                done[address] = answer
        return done, failed

    async def _ask(
        self, session: aiohttp.ClientSession, address: str, user_id: str
    ) -> dict[str, Any] | str:
        """A replica's answer, or why there is none."""
        url = f"http://{address}/v1/forget?{LOCAL}=1"
        try:
            async with session.post(url, json={USER: user_id}, allow_redirects=False) as response:
                body = await response.json()
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            return f"{type(error).__name__} {error}".strip()[:MAX_SHOWN]
        if response.status == 200 and isinstance(body, dict) and FORGOTTEN in body:
            return body
        return f"status {response.status}, {json.dumps(body)[:MAX_SHOWN]}"
