"""The composition root: everything that `epp serve` is made of, built once, in the order of the rooms.

It reads top to bottom: what the operator asked for, the pure whole, the edges around it, then start, wait for a
signal, and stop. The simulator builds the same pure whole from the same configuration.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import ssl
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec

from epp.config.running import Running
from epp.config.schema import Config
from epp.discovery.file import FileDiscovery
from epp.discovery.kube.discovery import KubeDiscovery
from epp.discovery.kube.reviews import Reviews
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import EndpointTable
from epp.errors import ConfigError
from epp.extproc.conversation import PROCESS, Conversation
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Methods, OpenCall, Tls, Transport
from epp.extproc.transport.tls import RenewableContext, cipher_suites, least_version
from epp.extproc.transport.wire import WireTransport
from epp.flags import ServeFlags
from epp.flow.policies import Policies
from epp.picker import Picker, PickerOptions
from epp.reload import Reload
from epp.settings import (
    read_candidate,
    read_config,
    read_metrics_files,
    read_metrics_source,
    read_port_files,
    read_scope,
    read_settings,
)
from epp.signals.scrape import Scraper
from epp.signals.sources import GpuPages, fetched
from epp.telemetry import log, tls
from epp.telemetry.eds import Eds
from epp.telemetry.exposition import Sources, render
from epp.telemetry.guard import Guard
from epp.telemetry.health import Health
from epp.telemetry.http import MetricsServer, Views
from epp.telemetry.metrics import Metrics
from epp.telemetry.views import decisions, endpoints
from epp.watch import FileWatch

logger = logging.getLogger("epp.server")

QUIET: Final = 2.0
"""Seconds without an open exchange after which a draining picker believes that nobody asks any more."""
TAKE_OVER: Final = 5.0
"""Seconds in which a standby takes a lease that was released: ours 2.4 at most, the reference's 4.4."""
PROBED: Final = 3.0
"""Seconds in which gateways find out that another leads: the reference's chart has it probed every two."""


class Server:
    """One picker process."""

    def __init__(self, flags: ServeFlags) -> None:
        """Build everything; nothing runs yet. Raises ConfigError."""
        self._flags = flags
        self._settings = read_settings(flags)
        watch = FileWatch(Path(flags.config_file)) if flags.config_file else None  # before it is read
        config = read_config(flags)
        log.set_up(flags.zap_encoder, flags.v)
        unheard = flags.without_effect(kubernetes=config.discovery is None, pages=config.pages.metrics is not None)
        for warning in (*unheard, *config.warnings):
            logger.warning(warning)
        self._now = time.monotonic
        self._problems = log.Problems(logger)
        self._renewals: list[tls.Renewal] = []
        self._stopping = asyncio.Event()
        self.metrics = Metrics(self._problems)

        self._build_picker(config)
        self._build_signals(config)
        self._build_ports()
        self._reload = None if watch is None else self._follow(watch, config)
        self._build_pages(config)

    def _build_picker(self, config: Config) -> None:
        """The pure whole, and what it knows."""
        flags, settings = self._flags, self._settings
        running = self._running = Running(config, random.Random(settings.seed))
        self._fetched = fetched(config.pages, read_metrics_source(flags), settings.scrape_interval, settings.freshness)
        table = self._table = EndpointTable(
            freshness=self._fetched.freshness,
            attributes=self._fetched.attributes,
            on_forget=lambda slot: self._picker.forget(slot),
        )
        self._ejection = Ejection(table, EjectionParams())
        options = PickerOptions(
            not flags.disable_endpoint_subset_filter,
            emit_scores=flags.emit_endpoint_scores,
            detector=running.detector,
        )
        drawn = random.Random(settings.seed)
        self._picker = Picker(table, running.scheduler, self._ejection, self.metrics, time.perf_counter, options, drawn)

    def _build_signals(self, config: Config) -> None:
        """Who says which endpoints there are, and what their pages say."""
        flags, problems = self._flags, self._problems
        spread = random.Random(self._settings.seed)  # its own, so that scraping changes no decision
        self._scraper = Scraper(self._table, spread, self._fetched.sources, clock=self._now)
        elected = config.discovery is None and flags.ha_enable_leader_election
        health = self._health = Health(elected=elected)
        self._discovery: FileDiscovery | KubeDiscovery
        if config.discovery is not None:
            path, follows = config.discovery.path, config.discovery.watch_file
            self._discovery = FileDiscovery(path, follows, self._table, self._now, on_sync=health.set_ready)
            return
        scope = read_scope(flags)
        self._discovery = KubeDiscovery(
            scope,
            self._table,
            now=self._now,
            rng=spread,
            on_policies=self._take_policies,
            on_sync=health.set_ready,
            failed=lambda path, error: problems.tell(path, "the API server: %s: %s", path, error),
            candidate=read_candidate(flags, scope),
            on_lead=self._lead,
        )

    def _build_ports(self) -> None:
        """ext_proc, and health with EDS beside it."""
        picker, limits = self._picker, self._settings.limits
        methods: dict[str, OpenCall] = {PROCESS: lambda peer, push, began: Conversation(picker, limits, peer, began)}
        if self._flags.health_checking:
            methods.update(self._health.methods())
        self._transport = self._carrier(methods)
        self._eds = Eds(self._table, self._problems)
        self._health_port = self._carrier({**self._health.methods(), **self._eds.methods()})

    def _build_pages(self, config: Config) -> None:
        """The metrics port, and who may read it."""
        flags, now, problems = self._flags, self._now, self._problems
        picker, table, ejection, running = self._picker, self._table, self._ejection, self._running
        scraper, transport, reload = self._scraper, self._transport, self._reload
        sources = Sources(
            table,
            self._settings.pool,
            now,
            version("epp"),
            scrape_errors=lambda: scraper.counts.errors,
            gpu_errors=None if config.pages.gpu is None else lambda: scraper.counts_of(GpuPages.what).errors,
            ejections=lambda: (int(ejection.out(table.listed, now()).sum()), ejection.total),
            prefix_blocks=lambda: running.scheduler.prefix_blocks(),
            streams=(lambda: (transport.streams_open, transport.streams_total))
            if flags.enable_grpc_stream_metrics
            else None,
            breaches=lambda: transport.breaches,
            reloads=None if reload is None else lambda: (reload.taken, reload.refused),
        )
        asks = config.discovery is None and flags.metrics_endpoint_auth is not False
        self._reviews = Reviews(lambda why: problems.tell(why, "metrics port: %s", why)) if asks else None
        wall_offset = time.time() - now()
        self._metrics_server = MetricsServer(
            Views(
                lambda: render(self.metrics, msgspec.structs.replace(sources, detector=running.detector)),
                lambda n: decisions(picker, n, wall_offset),
                lambda: endpoints(table, ejection, now()),
            ),
            None if self._reviews is None else Guard(self._reviews.review, now),
        )

    def _carrier(self, methods: Methods) -> Transport:
        settings = self._settings
        if self._flags.transport == "wire":
            return WireTransport(methods, settings.http2, self._now)
        receive, send = settings.max_receive_bytes, settings.max_send_bytes
        return GrpcioTransport(methods, self._now, max_receive_bytes=receive, max_send_bytes=send)

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code. Raises ConfigError when it cannot start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        await self._discovery.begin()
        if self._reviews is not None:
            await self._reviews.begin()
        await self._open_ports()
        async with asyncio.TaskGroup() as tasks:
            edges = [
                tasks.create_task(self._keep_running("discovery", self._discovery.run)),
                tasks.create_task(self._keep_running("scraping", self._scraper.run)),
                tasks.create_task(self._keep_running("telling Envoy", self._eds.run)),
                *(tasks.create_task(self._keep_running("certificates", each.run)) for each in self._renewals),
            ]
            if self._reload is not None:
                edges.append(tasks.create_task(self._keep_running("configuration", self._reload.run)))
            _spare_the_collector()
            await self._stopping.wait()
            await self._hand_over()
            await self._drain()
            for edge in edges:
                edge.cancel()
        return 0

    def _follow(self, watch: FileWatch, config: Config) -> Reload:
        flags = self._flags
        return Reload(flags.config_file, watch, config, lambda: read_config(flags), self._take_config)

    def _take_config(self, config: Config) -> None:
        self._running.take(config)
        self._picker.reconfigure(self._running.scheduler, self._running.detector)

    def _take_policies(self, policies: Policies) -> None:
        self._picker.policies = policies

    def _lead(self, leads: bool) -> None:
        if not self._stopping.is_set():  # who stops says what he said until another is found: `_hand_over`
            self._health.set_leading(leads)

    async def _keep_running(self, what: str, run: Callable[[], Awaitable[None]]) -> None:
        """An edge that fails makes its own values unknown, and nothing else: it begins anew."""
        while True:
            try:
                await run()
            except Exception as error:
                self.metrics.broke(what, error)
            await asyncio.sleep(1.0)

    async def _open_ports(self) -> None:
        flags = self._flags
        tls_options, metrics_context = self._secured()
        metrics_port = await self._metrics_server.start(None, flags.metrics_port, metrics_context)
        health_port = await _listen(self._health_port, "grpc-health-port", flags.grpc_health_port)
        port = await _listen(self._transport, "grpc-port", flags.grpc_port, tls_options)
        logger.info(
            "serving pool %s/%s: ext_proc on port %d (%s, %s), health on %d, metrics on %d, %d endpoints",
            self._settings.namespace,
            self._settings.pool,
            port,
            flags.transport,
            "TLS" if tls_options else "plaintext",
            health_port,
            metrics_port,
            len(self._table),
        )

    def _secured(self) -> tuple[Tls | None, RenewableContext | None]:
        """TLS of the ext_proc port and of the metrics port, and who follows their files. Raises ConfigError."""
        flags = self._flags
        options, context = None, None
        if (page := read_metrics_files(flags)) is not None:
            follow = tls.Renewal(page, lambda read: renewable.renew(_offered(read)), self._problems)
            renewable = context = RenewableContext(_offered(page.read()), "http/1.1")
            self._renewals.append(follow)  # whatever --enable-cert-reload says, as in the reference
        if (files := read_port_files(flags)) is not None:
            versions = least_version(flags.tls_min_version), cipher_suites(flags.tls_cipher_suites)
            follow = tls.Renewal(files, lambda read: self._transport.renew(_offered(read, *versions)), self._problems)
            options = _offered(files.read(), *versions)
            if flags.enable_cert_reload:
                self._renewals.append(follow)
        return options, context

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            logger.warning("second signal: stopping at once")
            os._exit(1)
        self._stopping.set()

    async def _hand_over(self) -> None:
        """A leader is ready until another one is, and gateways have had time to see it: else they had nobody to ask."""
        if isinstance(self._discovery, KubeDiscovery) and await self._discovery.hand_over(TAKE_OVER):
            await asyncio.sleep(PROBED)

    async def _drain(self) -> None:
        """NOT_SERVING first, then no new exchanges, then an end of those under way: docs/decisions/004-draining.md."""
        self._health.set_draining()
        logger.info("draining, for at most %.0f s", self._settings.drain_timeout)
        now = self._now
        began = busy_at = now()
        while now() - began < self._settings.drain_timeout / 2 and now() - busy_at < QUIET:
            if self._transport.streams_open:
                busy_at = now()
            await asyncio.sleep(0.05)
        await self._transport.stop(max(0.0, self._settings.drain_timeout - (now() - began)))
        await self._health_port.stop(0.0)
        await self._metrics_server.stop()
        if self._reviews is not None:
            await self._reviews.close()
        logger.info("stopped")


def _spare_the_collector() -> None:
    """What start-up made stays, so no collection looks at it again (24 ms of the loop each, measured); and of what
    comes later a dozen objects in 45,000 requests are cycles: to look through all once in millions is enough."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 1_000)


def _offered(
    read: tls.Credentials, least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2, ciphers: tuple[str, ...] = ()
) -> Tls:
    return Tls(read.key, read.certificate, least, ciphers, read.client_ca)


async def _listen(transport: Transport, flag: str, port: int, tls_options: Tls | None = None) -> int:
    try:
        return await transport.listen("::", port, tls_options)
    except OSError as error:
        raise ConfigError(f"--{flag} {port} cannot be bound ({error}); choose another") from None


async def serve(flags: ServeFlags) -> int:
    """Run `epp serve`. Raises ConfigError when what was asked cannot be served."""
    return await Server(flags).run()
