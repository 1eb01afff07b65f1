"""Raw JSON to and from a Kubernetes API server.

In: paths and queries. Out: parsed JSON, lists page by page, watches event by event.
Rules here:
- Credentials are the official client's business: in a pod its service account, whose token it reads anew every minute,
  elsewhere a kubeconfig with all that may stand in one.
- No model objects: what a watch brings is read once, as JSON, by whoever wants it.
Rejected: the client's own Watch, which reads lines of at most 128 KiB and parses each event twice.
Source: Kubernetes API concepts (efficient detection of changes, chunked lists, bookmarks, 410 Gone).
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
import msgspec
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_config

from epp.errors import ConfigError

Json = dict[str, Any]
Query = Mapping[str, str]

PAGE: Final = 500
"""Objects a page of a list, client-go's."""
TIMEOUT: Final = 30.0
JSON: Final = msgspec.json.Decoder(dict[str, Any])


class ApiError(Exception):
    """The API server answered, and said no."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message or f"{status} {reason}")
        self.status = status
        self.reason = reason
        """Of the Status object: NotFound, Forbidden, Conflict, Expired and so on."""


UNREACHABLE: Final = (aiohttp.ClientError, OSError, TimeoutError)
"""What it looks like when nobody answers."""


class Api:
    """One API server, as one identity."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, kubeconfig: str = "") -> Api:
        """Find the API server: a kubeconfig file where one is named or usual, else the pod's service account.

        Raises:
            ConfigError: there is neither.
        """
        configuration = Configuration()
        try:
            await load_config(client_configuration=configuration, config_file=kubeconfig or None)
        except (ConfigException, OSError) as error:
            raise ConfigError(
                f"no Kubernetes API server: {error}; run in a pod with a service account, or set KUBECONFIG"
            ) from None
        configuration.client_side_validation = False
        return cls(ApiClient(configuration))

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str, query: Query | None = None) -> Json:
        """Raises ApiError, and what is UNREACHABLE."""
        return await self._answer("GET", path, query)

    async def send(self, method: str, path: str, body: object, kind: str = "application/json") -> Json:
        """POST, PUT or PATCH an object. Raises as `get`.

        Args:
            kind: for a PATCH "application/merge-patch+json" or another that the API knows.
        """
        return await self._answer(method, path, None, body, kind)

    async def list(self, path: str, query: Query) -> tuple[list[Json], str]:
        """All objects, and the version at which they were so. Raises as `get`."""
        found: list[Json] = []
        page = {**query, "limit": str(PAGE)}
        while True:
            answer = await self.get(path, page)
            found += answer.get("items") or ()
            metadata = answer.get("metadata") or {}
            if not metadata.get("continue"):
                return found, str(metadata.get("resourceVersion", ""))
            page["continue"] = metadata["continue"]

    async def watch(self, path: str, query: Query, seconds: float) -> AsyncIterator[Json]:
        """Events `{"type": ..., "object": ...}` until the server ends the watch, which it does after `seconds`.

        Raises as `get`; ApiError too when an event says so.
        """
        asked = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(round(seconds))}
        response = await self._request("GET", path, asked, within=seconds + TIMEOUT)
        try:
            async for line in _lines(response.content.iter_any()):
                event = JSON.decode(line)
                if event.get("type") == "ERROR":
                    raise _error(event.get("object") or {})
                yield event
        finally:
            response.close()

    async def _answer(
        self, method: str, path: str, query: Query | None, body: object = None, kind: str = "application/json"
    ) -> Json:
        response = await self._request(method, path, query, body, kind)
        return JSON.decode(await response.read())

    async def _request(
        self,
        method: str,
        path: str,
        query: Query | None,
        body: object = None,
        kind: str = "application/json",
        within: float = TIMEOUT,
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": kind}
        given = list((query or {}).items())
        parts = await self._client.param_serialize(
            method, path, query_params=given, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        answer = await self._client.call_api(*parts, _request_timeout=aiohttp.ClientTimeout(total=within))
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 400:
            raise _error(_status(response.status, await response.read()))
        return response


async def _lines(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Lines of any length. What follows the last line break is incomplete: the connection was cut."""
    rest: list[bytes] = []
    async for piece in pieces:
        *whole, tail = piece.split(b"\n")
        for line in whole:
            rest.append(line)
            yield b"".join(rest)
            rest.clear()
        rest.append(tail)


def _status(code: int, body: bytes) -> Json:
    try:
        status = JSON.decode(body)
    except msgspec.DecodeError:
        status = {"message": body[:200].decode(errors="replace")}
    return {"code": code, **status}


def _error(status: Json) -> ApiError:
    return ApiError(int(status.get("code", 500)), str(status.get("reason", "")), str(status.get("message", "")))
