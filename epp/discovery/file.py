"""Endpoints from a file: for who has no Kubernetes.

In: a YAML or JSON file of the reference's form. Out: calls of `EndpointTable.replace`.
Rules here:
- Every mistake of the file is told with line and column. At start they end the process; later the endpoints that
  were good go on being used, whatever became of the file.
- A DNS name stands for all its addresses, looked up again and again; one that cannot be looked up keeps those it had.
- The file is read again once it has changed and rests (`epp.watch`), in a thread, since 1,000 endpoints take 0.3 s.
- What is wrong with a name is told when it begins and when it is over, not at each look-up.
Source: llm-d router, file-discovery: `endpoints[]{name, namespace, address, port, labels}`, at most 1 MiB; labels
`metricsAddress` and `metricsPort` as in its multi-cluster form. Names, IPv6 and DNS are ours: there only IPv4.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from epp.config.document import At, ConfigErrors, Document, Place
from epp.endpoints.table import Endpoint, EndpointTable, address_text, host_text
from epp.errors import ConfigError
from epp.watch import FileWatch

logger = logging.getLogger("epp.discovery")

LARGEST: Final = 1 << 20
"""Bytes of the file."""
WATCH_INTERVAL: Final = 0.25
"""Seconds between two looks at a watched file."""
LOOKUP_INTERVAL: Final = 10.0
"""Seconds between two look-ups of DNS names."""
FIELDS: Final = ("name", "namespace", "address", "port", "labels")
_DNS: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?", re.ASCII)


class Entry(msgspec.Struct, frozen=True):
    """One entry of the file."""

    name: str
    """"<namespace>/<name>"."""
    host: str
    """An IP address, or a DNS name."""
    port: int
    labels: dict[str, str] = {}
    place: Place = Place()

    @property
    def is_dns(self) -> bool:
        return not _is_ip(self.host)

    def endpoint(self, ip: str) -> Endpoint:
        """The endpoint at one of the entry's addresses."""
        name = f"{self.name}-{ip}" if self.is_dns else self.name
        host, port = self.labels.get("metricsAddress", ip), int(self.labels.get("metricsPort", self.port))
        metrics = address_text(host, port) if _is_ip(host) else f"{host}:{port}"
        return Endpoint(name, address_text(ip, self.port), self.labels, metrics)


def read_entries(text: str, file: str = "") -> tuple[Entry, ...]:
    """Read the file's text.

    Raises:
        ConfigErrors: everything that is wrong with it.
    """
    document = Document(text, file)
    if document.root is None and not document.errors:
        raise ConfigErrors([ConfigError("the file is empty; write `endpoints: []` for none", file=file)])
    top = document.fields(document.root, ("endpoints",)) if document.root is not None else None
    if top is not None and "endpoints" not in top and not document.errors and document.root is not None:
        document.complain(document.root, "endpoints is missing; write `endpoints: []` for none")
    entries = [_entry(document, item) for item in document.items((top or {}).get("endpoints"))]
    read = [entry for entry in entries if entry is not None]
    _refuse_twins(document, read)
    if document.errors:
        raise ConfigErrors(document.errors)
    return tuple(read)


class FileDiscovery:
    """Keeps a table's list of endpoints as a file says."""

    def __init__(
        self,
        path: str | Path,
        watch: bool,
        table: EndpointTable,
        now: Callable[[], float],
        on_sync: Callable[[bool], None] = lambda synced: None,
    ) -> None:
        """
        Args:
            watch: read the file again whenever it changes.
            on_sync: told when the table is filled and followed.
        """
        self._on_sync = on_sync
        self._path = Path(path)
        self._watch = watch
        self._table = table
        self._now = now
        self._entries: tuple[Entry, ...] = ()
        self._file = FileWatch(self._path)
        self._resolved: dict[str, tuple[str, ...]] = {}
        self._troubles: dict[str, str] = {}
        self.failed_reloads = 0
        """Times that a changed file was not taken."""

    async def begin(self) -> None:
        """Read the file and fill the table.

        Raises:
            ConfigError: it cannot be read, or everything that is wrong with it.
        """
        self._file.take()
        self._entries = await asyncio.to_thread(self._read)
        await self._fill()

    async def run(self) -> None:
        """Follow the file, if it is watched, and DNS names, for ever; call `begin` first."""
        self._on_sync(True)
        looked_up = self._now()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            if self._watch and self._file.has_changed():
                await self._reload()
            elif self._now() - looked_up >= LOOKUP_INTERVAL and any(entry.is_dns for entry in self._entries):
                looked_up = self._now()
                await self._fill()

    async def _reload(self) -> None:
        try:
            self._entries = await asyncio.to_thread(self._read)
        except ConfigError as error:
            self.failed_reloads += 1
            logger.error("the endpoints file is not taken, the last good one stays in use: %s", error)
            return
        await self._fill()
        logger.info("%s changed: %d endpoints", self._path, len(self._table))

    def _read(self) -> tuple[Entry, ...]:
        file = str(self._path)
        try:
            with self._path.open("rb") as stream:
                data = stream.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise ConfigError(f"larger than {LARGEST} bytes", file=file)
            return read_entries(data.decode("utf-8"), file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", file=file) from error
        except RecursionError as error:
            raise ConfigError("nested too deeply to be a list of endpoints", file=file) from error

    async def _fill(self) -> None:
        """Look names up, and list what there is. Of two entries that lead to one address the first counts."""
        troubles: dict[str, str] = {}
        found = await asyncio.gather(*(self._addresses(entry, troubles) for entry in self._entries))
        endpoints: dict[str, Endpoint] = {}
        for entry, ips in zip(self._entries, found, strict=True):
            for endpoint in map(entry.endpoint, ips):
                first = endpoints.setdefault(endpoint.address, endpoint)
                if first is not endpoint:
                    troubles[endpoint.name] = (
                        f"{endpoint.address} is that of {first.name} already; this one is left out"
                    )
        self._table.replace(endpoints.values(), self._now())
        self._tell(troubles)

    async def _addresses(self, entry: Entry, troubles: dict[str, str]) -> tuple[str, ...]:
        if not entry.is_dns:
            return (entry.host,)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(entry.host, entry.port, type=socket.SOCK_STREAM)
        except OSError as error:
            had = self._resolved.get(entry.host, ())
            then = f"its last {len(had)} addresses stay in use" if had else "it has no addresses yet"
            troubles[entry.name] = f"{entry.host} cannot be looked up ({error.strerror}); {then}"
            return had
        ips = self._resolved[entry.host] = tuple(sorted({str(address[4][0]) for address in found}))
        return ips

    def _tell(self, troubles: dict[str, str]) -> None:
        for name in troubles.keys() - self._troubles.keys():
            logger.warning("endpoint %s: %s", name, troubles[name])
        for name in self._troubles.keys() - troubles.keys():
            logger.info("endpoint %s: no longer so: %s", name, self._troubles[name])
        self._troubles = troubles


def _entry(document: Document, item: At) -> Entry | None:
    """One entry; None: something was reported."""
    before = len(document.errors)
    fields = document.fields(item, FIELDS)
    if fields is None:
        return None
    for required in ("name", "address", "port"):
        if required not in fields:
            document.complain(item, f"{required} is missing")
    name = document.text(fields["name"]) if "name" in fields else ""
    namespace = document.text(fields["namespace"]) if "namespace" in fields else "default"
    host = document.text(fields["address"]) if "address" in fields else ""
    port = _port(document, fields["port"]) if "port" in fields else 0
    labels = document.value(fields["labels"], dict[str, str]) if "labels" in fields else {}
    if host and not _is_host(host):
        document.complain(fields["address"], f"{host!r} is neither an IP address nor a DNS name")
    if labels and not _is_port(labels.get("metricsPort", "1")):
        document.complain(fields["labels"], "the label metricsPort must be a number from 1 to 65535")
    if labels and not _is_host(labels.get("metricsAddress", "localhost")):
        document.complain(fields["labels"], "the label metricsAddress must be an IP address or a DNS name")
    if len(document.errors) > before:
        return None
    return Entry(f"{namespace}/{name}", host or "", port, labels or {}, document.place(item))


def _port(document: Document, at: At) -> int:
    """The reference writes ports as text; numbers are taken too."""
    text = str(at.node.value)
    if not _is_port(text):
        document.complain(at, f"expected a port from 1 to 65535, not {text!r}")
        return 0
    return int(text)


def _refuse_twins(document: Document, entries: list[Entry]) -> None:
    for what, key in (("name", lambda entry: entry.name), ("address", _where)):
        first: dict[object, Entry] = {}
        for entry in entries:
            twin = first.setdefault(key(entry), entry)
            if twin is not entry:
                document.errors.append(entry.place.error(f"the {what} is the same as that of line {twin.place.line}"))


def _where(entry: Entry) -> tuple[str, int]:
    """The entry's address, however it is spelled."""
    return entry.host.lower().rstrip(".") if entry.is_dns else host_text(entry.host), entry.port


def _is_host(text: str) -> bool:
    return _is_ip(text) or _is_dns(text)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_dns(host: str) -> bool:
    """A DNS name whose last label is not a number: 10.0.0.256 is a slip, not a name."""
    return bool(_DNS.fullmatch(host)) and not host.rstrip(".").rpartition(".")[2].isdigit()


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535
