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

from epp.config.build import build, detector
from epp.discovery.file import FileDiscovery
from epp.discovery.kube.discovery import KubeDiscovery
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
from epp.settings import read_config, read_metrics_files, read_port_files, read_scope, read_settings
from epp.signals.scrape import Scraper
from epp.telemetry import log, tls
from epp.telemetry.eds import Eds
from epp.telemetry.exposition import Sources, render
from epp.telemetry.health import Health
from epp.telemetry.http import MetricsServer, Views
from epp.telemetry.metrics import Metrics
from epp.telemetry.views import decisions, endpoints

logger = logging.getLogger("epp.server")

QUIET = 2.0
"""Seconds without an open exchange after which a draining picker believes that nobody asks any more."""


class Server:
    """One picker process."""

    def __init__(self, flags: ServeFlags) -> None:
        """Build everything; nothing runs yet. Raises ConfigError."""
        settings = self._settings = read_settings(flags)
        config = read_config(flags)
        log.set_up(flags.zap_encoder, flags.v)
        for warning in (*flags.without_effect(), *config.warnings):
            logger.warning(warning)
        now = self._now = time.monotonic
        rng = random.Random(settings.seed)
        problems = self._problems = log.Problems(logger)
        self._renewals: list[tls.Renewal] = []

        self.metrics = Metrics(problems)
        scheduler = build(config, rng)
        table = self._table = EndpointTable(freshness=settings.freshness, on_forget=scheduler.forget)
        ejection = Ejection(table, EjectionParams())
        options = PickerOptions(
            not flags.disable_endpoint_subset_filter,
            emit_scores=flags.emit_endpoint_scores,
            detector=detector(config),
        )
        drawn = random.Random(settings.seed)
        picker = self._picker = Picker(table, scheduler, ejection, self.metrics, time.perf_counter, options, drawn)

        spread = random.Random(settings.seed)  # its own, so that scraping changes no decision
        scraper = self._scraper = Scraper(table, spread, interval=settings.scrape_interval, clock=now)
        health = self._health = Health()
        self._discovery: FileDiscovery | KubeDiscovery
        if config.discovery is not None:
            self._discovery = FileDiscovery(
                config.discovery.path, config.discovery.watch_file, table, now, on_sync=health.set_ready
            )
        else:
            self._discovery = KubeDiscovery(
                read_scope(flags),
                table,
                now=now,
                rng=spread,
                on_policies=self._take_policies,
                on_sync=health.set_ready,
                failed=lambda path, error: problems.tell(path, "the API server: %s: %s", path, error),
            )
        methods: dict[str, OpenCall] = {
            PROCESS: lambda peer, push, began: Conversation(picker, settings.limits, peer, began)
        }
        if flags.health_checking:
            methods.update(self._health.methods())
        transport = self._transport = self._carrier(flags, methods)
        self._eds = Eds(table, problems)
        self._health_port = self._carrier(flags, {**self._health.methods(), **self._eds.methods()})
        sources = Sources(
            table,
            settings.pool,
            now,
            version("epp"),
            scrape_errors=lambda: (scraper.counts.poll_errors, scraper.counts.extract_errors),
            ejections=lambda: (int(ejection.out(table.listed, now()).sum()), ejection.total),
            prefix_blocks=scheduler.prefix_blocks,
            streams=(lambda: (transport.streams_open, transport.streams_total))
            if flags.enable_grpc_stream_metrics
            else None,
            breaches=lambda: transport.breaches,
        )
        wall_offset = time.time() - now()
        self._metrics_server = MetricsServer(
            Views(
                lambda: render(self.metrics, sources),
                lambda n: decisions(picker, n, wall_offset),
                lambda: endpoints(table, ejection, now()),
            )
        )
        self._flags = flags

    def _carrier(self, flags: ServeFlags, methods: Methods) -> Transport:
        settings = self._settings
        if flags.transport == "wire":
            return WireTransport(methods, settings.http2, self._now)
        receive, send = settings.max_receive_bytes, settings.max_send_bytes
        return GrpcioTransport(methods, self._now, max_receive_bytes=receive, max_send_bytes=send)

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code. Raises ConfigError when it cannot start."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, stopping)
        await self._discovery.begin()
        await self._open_ports()
        async with asyncio.TaskGroup() as tasks:
            edges = [
                tasks.create_task(self._keep_running("discovery", self._discovery.run)),
                tasks.create_task(self._keep_running("scraping", self._scraper.run)),
                tasks.create_task(self._keep_running("telling Envoy", self._eds.run)),
                *(tasks.create_task(self._keep_running("certificates", each.run)) for each in self._renewals),
            ]
            _spare_the_collector()
            await stopping.wait()
            await self._drain()
            for edge in edges:
                edge.cancel()
        return 0

    def _take_policies(self, policies: Policies) -> None:
        self._picker.policies = policies

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

    def _on_signal(self, stopping: asyncio.Event) -> None:
        if stopping.is_set():
            logger.warning("second signal: stopping at once")
            os._exit(1)
        stopping.set()

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
        logger.info("stopped")


def _spare_the_collector() -> None:
    """What start-up made stays, so no collection looks at it again (24 ms of the loop each, measured); and the index of
    200,000 prompts takes 63 ms to look through, for a dozen cycles in 45,000 requests: once in millions is enough."""
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
