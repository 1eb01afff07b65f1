"""What the picker tells of a whole answer is in Envoy's access log, in whatever mode bodies are shown."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.e2e.client import chat, post, send
from tests.e2e.test_well_known import envoy_is_here, picker
from tests.e2e.upstream import Answer, Upstream

if TYPE_CHECKING:
    from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap

    from epp.demo.envoy import Body, Response

__all__ = ("envoy_is_here",)
pytestmark = [pytest.mark.anyio, pytest.mark.e2e]

COST = "x-gateway-inference-request-cost"
CONFIG = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "plugins": [
        {
            "type": "request-attribute-reporter",
            "parameters": {
                "attributes": [
                    {
                        "key": {"namespace": "envoy.lb", "name": COST},
                        "expression": "usage.completion_tokens",
                        "condition": "has(usage.completion_tokens)",
                    }
                ]
            },
        }
    ],
}
MODES: dict[str, tuple[Body, Response]] = {
    "duplex": ("FULL_DUPLEX_STREAMED", "SEND/FULL_DUPLEX_STREAMED/SEND"),
    "whole": ("BUFFERED", "SEND/BUFFERED/SEND"),
    "passing": ("BUFFERED", "SEND/STREAMED/SEND"),
    "light": ("FULL_DUPLEX_STREAMED", "SEND/NONE/SEND"),
}
USAGE = b'{"choices":[],"usage":{"completion_tokens":10,"prompt_tokens":32,"total_tokens":42}}'


def logging_to(path: Path, config: Bootstrap) -> Bootstrap:
    """With an access log of each request: its gateway, its status, and what the picker told of it."""
    from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
    from envoy_data_plane.envoy.config.core.v3 import DataSource, SubstitutionFormatString
    from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
    from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
    from envoy_data_plane.google.protobuf import Any

    assert config.static_resources is not None
    for listener in config.static_resources.listeners:
        (chain,) = listener.filter_chains
        packed = chain.filters[0].typed_config
        assert packed is not None
        manager = packed.unpack()
        assert isinstance(manager, HttpConnectionManager)
        line = f"{listener.name} %RESPONSE_CODE% %DYNAMIC_METADATA(envoy.lb:{COST})%\n"
        log_format = SubstitutionFormatString(text_format_source=DataSource(inline_string=line))
        log = FileAccessLog(path=str(path), log_format=log_format)
        manager.access_log = [AccessLog(name="file", typed_config=Any.pack(log))]
        chain.filters[0].typed_config = Any.pack(manager)
    return config


@pytest.mark.usefixtures("envoy_is_here")
@pytest.mark.timeout(60)
async def test_envoy_logs_what_an_answer_cost(tmp_path: Path) -> None:
    from epp.demo import envoy

    log = tmp_path / "access.log"
    async with contextlib.AsyncExitStack() as stack:
        upstream = Upstream()
        await upstream.listen()
        stack.push_async_callback(upstream.close)
        upstream.answer = lambda seen: Answer(steps=(USAGE[:50], USAGE[50:]))
        listing, pool, file = tmp_path / "endpoints.yaml", tmp_path / "pool.json", tmp_path / "picker.yaml"
        port = upstream.address.rpartition(":")[2]
        listing.write_text(yaml.safe_dump({"endpoints": [{"name": "a", "address": "127.0.0.1", "port": port}]}))
        envoy.write_endpoints(pool, [upstream.address])
        file.write_text(yaml.safe_dump(CONFIG))
        (tmp_path / "picker").mkdir()
        running = await stack.enter_async_context(picker(tmp_path / "picker", file, listing))
        gateways = [
            envoy.Gateway(
                name=name,
                endpoints=pool,
                picker=envoy.Picker(address=running.address, request_body=body, response=response),
            )
            for name, (body, response) in MODES.items()
        ]
        gateway = await stack.enter_async_context(envoy.running(logging_to(log, envoy.bootstrap(gateways)), tmp_path))
        for name in MODES:
            got = await send(gateway.ports[name], post("/v1/chat/completions", chat()))
            assert (got.status, got.body) == (200, USAGE), name
    # Envoy writes the rest of its log when it ends. Where it shows no bodies there is nothing to tell.
    assert sorted(log.read_text().split("\n")) == ["", "duplex 200 10", "light 200 -", "passing 200 10", "whole 200 10"]
