"""Raw JSON to and from a Kubernetes API server.

In: paths and queries. Out: parsed JSON, lists page by page, watches event by event.
Rules here:
- Credentials are the official client's business: in a pod its service account, whose token it reads anew every minute,
  elsewhere a kubeconfig with all that may stand in one.
- No model objects: what a watch brings is read once, as JSON, by whoever wants it.
- Of a list each object is read by itself, and without `managedFields`, which nobody here reads: 1,000 pods of 10 KB
  take 33 MiB and 0.09 s of CPU, where pages read whole take 66 MiB and 0.26 s.
- Whatever answers in the API server's place (a proxy, half an answer) is as good as nobody.
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
CONNECT: Final = 10.0
"""Seconds to connect in. Without it a watch of two minutes would wait as long for a server that takes no packets."""
JSON: Final = msgspec.json.Decoder(dict[str, Any])


class _Event(msgspec.Struct, rename={"item": "object"}):
    """What each line of a watch is."""

    type: str
    item: Json


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    """A page of a list."""

    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


EVENT: Final = msgspec.json.Decoder(_Event)
PAGE_OF_LIST: Final = msgspec.json.Decoder(_Page)


class ApiError(Exception):
    """The API server answered, and said no."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message or f"{status} {reason}")
        self.status = status
        self.reason = reason
        """Of the Status object: NotFound, Forbidden, Conflict, Expired and so on."""


UNREACHABLE: Final = (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError)
"""What it looks like when nobody answers, or somebody else."""


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
        asked = {**query, "limit": str(PAGE)}
        while True:
            response = await self._request("GET", path, asked)
            page = PAGE_OF_LIST.decode(await response.read())
            found += map(_listed, page.items or ())
            if not page.metadata.continue_:
                return found, page.metadata.resource_version
            asked["continue"] = page.metadata.continue_

    async def watch(self, path: str, query: Query, seconds: float) -> AsyncIterator[tuple[str, Json]]:
        """Events, each its type and its object, until the server ends the watch, which it does after `seconds`.

        Raises as `get`; ApiError too when an event says so.
        """
        asked = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(round(seconds))}
        response = await self._request("GET", path, asked, within=seconds + TIMEOUT)
        try:
            async for line in _lines(response.content.iter_any()):
                event = EVENT.decode(line)
                if event.type == "ERROR":
                    raise _error(event.item)
                yield event.type, event.item
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
        limits = aiohttp.ClientTimeout(total=within, sock_connect=CONNECT)
        answer = await self._client.call_api(*parts, _request_timeout=limits)
        response: aiohttp.ClientResponse = answer.response
        if response.status >= 400:
            raise _error(_status(response.status, await response.read()))
        return response


def _listed(raw: msgspec.Raw) -> Json:
    item = JSON.decode(raw)
    metadata = item.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("managedFields", None)
    return item


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
