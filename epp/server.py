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
import re
import signal
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import version

import msgspec

from epp.config.build import build, detector
from epp.config.load import load, load_file
from epp.config.schema import Config
from epp.config.units import parse_duration, parse_quantity
from epp.discovery.file import FileDiscovery
from epp.discovery.kube.discovery import KubeDiscovery
from epp.discovery.kube.objects import Pool
from epp.discovery.kube.selector import parse_selector
from epp.discovery.kube.view import POOLS, NamedPool, SelectedPods
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import EndpointTable
from epp.errors import ConfigError
from epp.extproc.conversation import PROCESS, Conversation
from epp.extproc.exchange import Limits
from epp.extproc.http2.faults import ConnectionLimits
from epp.extproc.transport.grpcio import GrpcioTransport
from epp.extproc.transport.options import Methods, OpenCall, Tls, Transport
from epp.extproc.transport.tls import RenewableContext, cipher_suites, least_version
from epp.extproc.transport.wire import WireTransport
from epp.flags import ServeFlags
from epp.flow.policies import Policies
from epp.picker import Picker, PickerOptions
from epp.scheduling.catalogue import catalogue, installed
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


class Settings(msgspec.Struct, frozen=True):
    """The flags, read: quantities as bytes, durations as seconds."""

    pool: str
    namespace: str
    limits: Limits
    http2: ConnectionLimits
    max_receive_bytes: int
    max_send_bytes: int
    scrape_interval: float
    freshness: float
    drain_timeout: float
    seed: int


def read_settings(flags: ServeFlags) -> Settings:
    """Check the flags that are not plain numbers. Raises ConfigError naming the flag."""

    def quantity(name: str, value: str) -> int:
        try:
            return parse_quantity(value)
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None

    def duration(name: str, value: str) -> float:
        try:
            return parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None

    receive, send = flags.grpc_max_recv_msg_size, flags.grpc_max_send_msg_size
    max_body = quantity("max-body", flags.max_body)
    # A buffered body comes in one message, and a 413 for it is worth more than a gRPC status.
    max_receive = quantity("grpc-max-recv-msg-size", receive) if receive else 2 * max_body + (1 << 20)
    return Settings(
        pool=flags.pool_name or "default",
        namespace=read_namespace(flags),
        limits=Limits(max_body=max_body),
        http2=read_http2_limits(flags.http2_limit, max_receive),
        max_receive_bytes=max_receive,
        max_send_bytes=quantity("grpc-max-send-msg-size", send) if send else -1,
        scrape_interval=max(0.001, duration("refresh-metrics-interval", flags.refresh_metrics_interval)),
        freshness=duration("metrics-staleness-threshold", flags.metrics_staleness_threshold),
        drain_timeout=duration("drain-timeout", flags.drain_timeout),
        seed=random.SystemRandom().getrandbits(64) if flags.seed is None else flags.seed,
    )


def read_http2_limits(texts: Iterable[str], max_message_bytes: int) -> ConnectionLimits:
    """Every `--http2-limit NAME=VALUE`. Raises ConfigError."""
    kinds = {field.name.replace("_", "-"): field.type for field in msgspec.structs.fields(ConnectionLimits)}
    chosen: dict[str, int | float] = {
        "max_message_bytes": max_message_bytes,
        "max_queued_bytes": max(ConnectionLimits().max_queued_bytes, 2 * max_message_bytes),
    }
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise ConfigError(f"--http2-limit {text!r}: NAME=VALUE is expected, with a name of {', '.join(kinds)}")
        try:
            chosen[name.replace("-", "_")] = parse_quantity(value) if kinds[name] is int else parse_duration(value)
        except ValueError as error:
            raise ConfigError(f"--http2-limit {name}: {error}") from None
    return msgspec.convert(chosen, ConnectionLimits)


def read_port_files(flags: ServeFlags) -> tls.CredentialFiles | None:
    """Where the certificate of the ext_proc port lies; None: it is plaintext. Raises ConfigError."""
    if flags.enable_cert_reload and not flags.cert_path:
        raise ConfigError("--enable-cert-reload needs --cert-path; a certificate made at start never changes")
    if flags.client_ca_file and not flags.secure_serving:
        raise ConfigError("--client-ca-file needs TLS; remove it, or --secure-serving=false")
    return tls.CredentialFiles(flags.cert_path, flags.client_ca_file) if flags.secure_serving else None


def read_metrics_files(flags: ServeFlags) -> tls.CredentialFiles | None:
    """Likewise of the metrics port."""
    folder, client_ca = flags.metrics_cert_dir, flags.metrics_client_ca_file
    if client_ca and not folder:
        raise ConfigError("--metrics-client-ca-file needs --metrics-cert-dir, a folder with tls.crt and tls.key")
    return tls.CredentialFiles(folder, client_ca, "--metrics-cert-dir", "--metrics-client-ca-file") if folder else None


def read_config(flags: ServeFlags) -> Config:
    """The EndpointPickerConfig. Raises ConfigError."""
    if flags.config_file and flags.config_text:
        raise ConfigError("--config-file and --config-text are both given; keep one")
    plugins = catalogue(installed())
    if flags.config_file:
        return load_file(flags.config_file, plugins)
    return load(flags.config_text, "--config-text", plugins)


def read_namespace(flags: ServeFlags) -> str:
    return flags.pool_namespace or os.environ.get("NAMESPACE", "") or "default"


def read_scope(flags: ServeFlags) -> NamedPool | SelectedPods:
    """What to serve of a Kubernetes cluster. Raises ConfigError."""
    namespace = read_namespace(flags)
    if bool(flags.pool_name) == bool(flags.endpoint_selector):
        raise ConfigError(
            "no source of endpoints: give --pool-name or --endpoint-selector, not both, to find them in Kubernetes, "
            "or configure dataLayer.discovery.pluginRef with a plugin of type file-discovery"
        )
    if flags.pool_name:
        kinds = {kind.group: (kind,) for kind in POOLS}
        if flags.pool_group not in kinds:
            raise ConfigError(f"--pool-group {flags.pool_group!r}: {' or '.join(kinds)} is expected")
        return NamedPool(namespace, flags.pool_name, kinds[flags.pool_group])
    ports = tuple(dict.fromkeys(port.strip() for text in flags.endpoint_target_ports for port in text.split(",")))
    if not 1 <= len(ports) <= 8 or not all(port.isdigit() and 1 <= int(port) <= 65535 for port in ports):
        raise ConfigError("--endpoint-target-ports: 1 to 8 port numbers are expected with --endpoint-selector")
    # The reference's pool is then the Deployment, by the name that its pods have in common.
    deployment = re.fullmatch(r"(.+)-[a-z0-9]+-[a-z0-9]+", os.environ.get("POD_NAME", ""))
    if deployment is None:
        raise ConfigError("--endpoint-selector needs the environment's POD_NAME, as a Deployment's pod has it")
    pool = Pool(parse_selector(flags.endpoint_selector), tuple(map(int, ports)))
    return SelectedPods(namespace, deployment[1], pool)


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
