"""Asks the API server who has a token, and whether he may do what he asks for.

In: a bearer token, a verb, a path. Out: an HTTP status that says which of the two failed, or that neither did.
Rules here:
- Whatever is not an answer of the API server's is no permission: it is told to the operator, and the reader is refused.
- Nothing is remembered, and no token is told to anybody but the API server.
- No audience is named, so only tokens that were made for the API server itself are taken.
Source: Kubernetes TokenReview (authentication.k8s.io/v1) and SubjectAccessReview (authorization.k8s.io/v1), in the
order and with the timeout's meaning of controller-runtime's `WithAuthenticationAndAuthorization`. There a token that
nobody knows is a 500; here it is a 401.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import msgspec

from epp.discovery.kube.api import UNREACHABLE, Api, ApiError, Json

TOKENS: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
RIGHTS: Final = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
WITHIN: Final = 5.0
"""Seconds for both: Prometheus waits ten for its page."""

NEEDS: Final = (
    "give the picker's ServiceAccount a ClusterRole that may create tokenreviews (API group authentication.k8s.io) "
    "and subjectaccessreviews (authorization.k8s.io), or set --metrics-endpoint-auth=false"
)


class User(msgspec.Struct, frozen=True):
    """Whose token it is, as the API server says."""

    username: str = ""
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: dict[str, tuple[str, ...]] = {}


class TokenStatus(msgspec.Struct, frozen=True):
    """Of a TokenReview."""

    authenticated: bool = False
    user: User = User()


class AccessStatus(msgspec.Struct, frozen=True):
    """Of a SubjectAccessReview."""

    allowed: bool = False
    denied: bool = False


class Reviews:
    """Questions to one API server."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        """
        Args:
            failed: told why a question has no answer, and what to do.
        """
        self._failed = failed
        self._api: Api | None = None

    async def begin(self, kubeconfig: str = "") -> None:
        """Find the API server, which need not answer yet. Raises ConfigError: there is no way to one."""
        self._api = await Api.connect(kubeconfig)

    async def close(self) -> None:
        if self._api is not None:
            await self._api.close()

    async def review(self, token: str, verb: str, path: str) -> HTTPStatus:
        """OK, UNAUTHORIZED: nobody's token, FORBIDDEN, or INTERNAL_SERVER_ERROR: there was no answer. Raises nothing.

        Args:
            verb: the HTTP method in small letters, as roles have it.
            path: of the request, which roles name as a nonResourceURL.
        """
        try:
            async with asyncio.timeout(WITHIN):
                return await self._review(token, verb, path)
        except ApiError as error:
            self._failed(f"{error}; {NEEDS}" if error.status == HTTPStatus.FORBIDDEN else str(error))
        except TimeoutError:
            self._failed(f"the API server did not answer within {WITHIN:.0f} s")
        except UNREACHABLE as error:
            self._failed(f"the API server: {error}")
        return HTTPStatus.INTERNAL_SERVER_ERROR

    async def _review(self, token: str, verb: str, path: str) -> HTTPStatus:
        found = msgspec.convert(await self._ask(TOKENS, "TokenReview", {"token": token}), TokenStatus)
        if not found.authenticated:
            return HTTPStatus.UNAUTHORIZED
        user = found.user
        who = {"user": user.username, "uid": user.uid, "groups": user.groups, "extra": user.extra}
        spec = {**who, "nonResourceAttributes": {"path": path, "verb": verb}}
        access = msgspec.convert(await self._ask(RIGHTS, "SubjectAccessReview", spec), AccessStatus)
        return HTTPStatus.OK if access.allowed and not access.denied else HTTPStatus.FORBIDDEN

    async def _ask(self, path: str, kind: str, spec: Json) -> Json:
        """The status of a review. Raises as `Api.send`."""
        assert self._api is not None, "begin comes first"
        version = path.removeprefix("/apis/").rpartition("/")[0]
        answer = await self._api.send("POST", path, {"apiVersion": version, "kind": kind, "spec": spec})
        return answer.get("status") or {}
