"""What is fetched from every endpoint: its metrics page, and its GPUs' page where the configuration asks for it.

In: which sources count, and how they are asked. Out: where each endpoint's page is, and who takes it to the table.
Rules here:
- One source's failure makes what it tells unknown, and nothing else.
- What is fetched seldom may be older: a limit of freshness is `PATIENCE` intervals at least, so that one page that
  fails to come makes nothing unknown.
Source: llm-d router, metrics and DCGM data sources; NVIDIA's DCGM exporter for its labels.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final, Protocol

import msgspec

from epp.config.pages import GPU_USE, MetricsSource, Pages, PageSource
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.signals.engines import Engines, engines
from epp.signals.page import Engine, Families, Spec, read_page, recognise, values
from epp.signals.tls import ClientTls
from epp.units import parse_duration

PATIENCE: Final = 2.5
"""Intervals in which a page must come again."""
GPU_INTERVAL: Final = 1.0
"""Seconds between two GPU pages where nothing is said: the exporter itself measures every 30 by default."""
SHORTEST: Final = 0.001
GPU_FAMILY: Final = b"DCGM_FI_DEV_GPU_UTIL"


class Reader(Protocol):
    """Takes the pages of one endpoint to the table."""

    def asked(self) -> None:
        """A page is asked for."""

    def take(self, body: bytes, asked_at: float) -> bool:
        """A page has come; False: it says nothing that can be used."""


class Source(Protocol):
    """One page that every endpoint has."""

    @property
    def way(self) -> Way: ...

    @property
    def what(self) -> str:
        """Its name in logs."""

    def address(self, endpoint: Endpoint) -> str:
        """ "host:port" that is asked."""

    def identity(self, endpoint: Endpoint) -> object:
        """While it stays the same, what is known of the endpoint's page stays true."""

    def reader(self, table: EndpointTable, slot: int, endpoint: Endpoint) -> Reader: ...


class Way(msgspec.Struct, frozen=True, eq=False):
    """How a page is fetched."""

    path: str = "/metrics"
    port: int = 0
    """0: the endpoint's own."""
    interval: float = 0.05
    """Seconds between two pages of one endpoint."""
    tls: ClientTls | None = None
    """None: plain HTTP."""

    def address(self, endpoint: Endpoint, host: str = "") -> str:
        """
        Args:
            host: in place of the endpoint's; empty: its own.
        """
        if not self.port and not host:
            return endpoint.address
        own, _, port = endpoint.address.rpartition(":")
        return f"{host or own}:{self.port or port}"


class MetricsPages(msgspec.Struct, frozen=True, eq=False):
    """The pages that say how busy engines are."""

    way: Way = Way()
    engines: Engines = Engines()
    what: ClassVar[str] = "metrics"

    def address(self, endpoint: Endpoint) -> str:
        return endpoint.metrics_address or self.way.address(endpoint)

    def identity(self, endpoint: Endpoint) -> object:
        return self.engines.labelled(endpoint.labels)

    def reader(self, table: EndpointTable, slot: int, endpoint: Endpoint) -> Reader:
        return EngineReader(table, slot, self.engines, self.engines.labelled(endpoint.labels))


class EngineReader:
    """Reads one endpoint's metrics pages as those of the engine that its label names, or that they show."""

    def __init__(self, table: EndpointTable, slot: int, known: Engines, labelled: Engine | None) -> None:
        self._table = table
        self._slot = slot
        self._generation = table.generation(slot)
        self._tried = known.tried
        self._is_labelled = labelled is not None
        self._engine = labelled

    def asked(self) -> None:
        self._table.page_asked(self._slot)

    def take(self, body: bytes, asked_at: float) -> bool:
        page = self._read(body)
        if page.says_nothing:
            return False
        self._table.page_told(self._slot, self._generation, page, asked_at)
        return True

    def _read(self, body: bytes) -> Page:
        page = self._read_as(self._engine or recognise(body, self._tried), body)
        if page.says_nothing and not self._is_labelled:
            page = self._read_as(recognise(body, self._tried), body)  # another server may run at this address now
        return page

    def _read_as(self, engine: Engine | None, body: bytes) -> Page:
        self._engine = engine
        return Page() if engine is None else read_page(body, engine)


class GpuPages(msgspec.Struct, frozen=True, eq=False):
    """The pages of DCGM's exporter, which stands beside a pod or on its node."""

    way: Way = Way(port=9400, interval=GPU_INTERVAL)
    on_node: bool = False
    """Ask the node."""
    what: ClassVar[str] = "GPU metrics"

    def address(self, endpoint: Endpoint) -> str:
        return self.way.address(endpoint, endpoint.node_address if self.on_node else "")

    def identity(self, endpoint: Endpoint) -> object:
        return None

    def reader(self, table: EndpointTable, slot: int, endpoint: Endpoint) -> Reader:
        return GpuReader(table, slot, endpoint)


class GpuReader:
    """Reads how busy the busiest GPU of one endpoint's pod is."""

    def __init__(self, table: EndpointTable, slot: int, endpoint: Endpoint) -> None:
        self._table = table
        self._slot = slot
        self._generation = table.generation(slot)
        self._name = endpoint.name

    def asked(self) -> None:
        pass

    def take(self, body: bytes, asked_at: float) -> bool:
        use = gpu_use(body, self._name)
        if math.isnan(use):
            return False
        self._table.attributes_told(self._slot, self._generation, ((GPU_USE, use),), asked_at)
        return True


def gpu_use(page: bytes, name: str) -> float:
    """Share of the time that the busiest GPU of a pod was busy, 0..1; NaN: the page does not say.

    Args:
        page: of an exporter. One that knows pods says whose each GPU is; one that does not has no GPUs but the pod's.
        name: of the endpoint: "<namespace>/<pod>-rank-<i>", or without a rank.
    """
    families = Families(page)
    namespace, _, pod = (name.rpartition("-rank-")[0] or name).partition("/")
    knows_pods = any(b'pod="' in line for line in families[GPU_FAMILY])
    if knows_pods and not pod:
        return math.nan  # GPUs that no pod has are labelled so, too
    where = (("namespace", namespace), ("pod", pod)) if knows_pods else ()
    percents = values(families, Spec(GPU_FAMILY, where))
    is_known = bool(percents) and all(0 <= percent <= 100 for percent in percents)
    return max(percents) / 100 if is_known else math.nan


class Fetched(msgspec.Struct, frozen=True, eq=False):
    """Everything that is fetched of endpoints, and how old it may be."""

    sources: tuple[Source, ...]
    freshness: float
    """Seconds after which a metrics page's gauges are unknown."""
    attributes: dict[str, float]
    """Likewise of each attribute."""


def fetched(pages: Pages, default: MetricsSource, interval: float, freshness: float) -> Fetched:
    """What a configuration has fetched.

    Args:
        default: how metrics pages are where the configuration does not say.
        interval: seconds between two metrics pages where nothing is said.
        freshness: seconds that what they tell may be old.

    Raises:
        ConfigError: a file that it names cannot be used.
    """
    metrics = MetricsPages(way(pages.metrics or default, interval), engines(pages.core))
    sources: list[Source] = [metrics]
    old = max(freshness, PATIENCE * metrics.way.interval)
    attributes = dict.fromkeys(pages.core.attributes, old)
    if pages.gpu is not None:
        gpu = GpuPages(way(pages.gpu, GPU_INTERVAL), pages.gpu.use_node_address)
        sources.append(gpu)
        attributes[GPU_USE] = max(freshness, PATIENCE * gpu.way.interval)
    return Fetched(tuple(sources), old, attributes)


def way(params: PageSource, interval: float) -> Way:
    """How a source's pages are fetched.

    Args:
        interval: where it names none.

    Raises:
        ConfigError: a file that it names cannot be used.
    """
    path = params.path if params.path.startswith("/") else f"/{params.path}"
    chosen = parse_duration(params.interval) if params.interval else interval
    tls = ClientTls(params) if params.scheme == "https" else None
    return Way(path, params.port, max(SHORTEST, chosen), tls)
