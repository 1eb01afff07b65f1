"""What every transport must do: the transcripts, over the wire, spoken with Envoy's own messages.

`check_transcript` drives one stream as Envoy would; what is internal to the picker (AskDecision, Decided, Report,
Finished) is done by a real picker over endpoints that make the transcript's decision the only possible one.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as ep
from grpc import aio

from epp.config.build import build
from epp.config.load import load
from epp.endpoints.ejection import Ejection, EjectionParams
from epp.endpoints.table import Endpoint, EndpointTable, Page
from epp.extproc import events
from epp.extproc.events import Decided, Modes
from epp.picker import Picker, PickerOptions
from tests.extproc import oracle
from tests.extproc.transcripts import Immediate, Inside, Step, Transcript
from tests.watching import Watch

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
INTERNAL = (events.Decided, events.Refused, events.Lost, events.Expired)
QUEUE_ALONE = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: max-score-picker
  parameters: {maxNumOfEndpoints: 8}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: queue-scorer}, {pluginRef: max-score-picker}]
"""


def picker_for(endpoints: tuple[str, ...], watch: Watch, config: str = QUEUE_ALONE) -> Picker:
    """A picker that prefers these endpoints in this order: the n-th has n requests waiting."""
    table = EndpointTable(freshness=1e9)
    for waiting, address in enumerate(endpoints):
        slot = table.put(Endpoint(f"default/pod-{waiting}", address), now=0.0)
        table.page_told(slot, table.generation(slot), Page(waiting=float(100 * waiting)), now=0.0)
    scheduler = build(load(config), random.Random(1))
    ejection = Ejection(table, EjectionParams())
    return Picker(table, scheduler, ejection, watch, lambda: 0.0, PickerOptions())


def decided_endpoints(transcript: Transcript) -> tuple[str, ...]:
    """The endpoints that the transcript's decision names; none where it is refused."""
    return next((step.event.endpoints for step in transcript.steps if isinstance(step.event, Decided)), ())


def channel(address: str, credentials: grpc.ChannelCredentials | None = None) -> aio.Channel:
    """One connection. A certificate is expected to be for localhost."""
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return aio.insecure_channel(address, options)
    return aio.secure_channel(address, credentials, options)


@asynccontextmanager
async def stream(connection: aio.Channel) -> AsyncIterator[aio.StreamStreamCall[bytes, bytes]]:
    """One ext_proc stream of raw bytes; cancelled at the end, as Envoy does."""
    call: aio.StreamStreamCall[bytes, bytes] = connection.stream_stream(METHOD)()
    try:
        yield call
    finally:
        call.cancel()


async def check_transcript(address: str, transcript: Transcript) -> None:
    """Play a transcript against the server at `address`."""
    modes: Modes | None = None
    async with channel(address) as connection, stream(connection) as call:
        for step in transcript.steps:
            if not isinstance(step.event, INTERNAL):
                first = modes is None
                if modes is None:
                    modes = getattr(step.event, "modes", Modes())
                await call.write(oracle.message(step.event, modes if first else None).SerializeToString())
            if modes is not None:
                await _check_replies(call, step, modes, f"{transcript.name}.txt:{step.line}")
            if step.error is not None:
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert step.error in (await call.details() or "")
                return


async def _check_replies(call: aio.StreamStreamCall[bytes, bytes], step: Step, modes: Modes, where: str) -> None:
    for action in step.expected:
        if isinstance(action, Inside):
            continue
        reply = await call.read()
        assert isinstance(reply, bytes), f"{where}: the stream ended"
        got = ep.ProcessingResponse.FromString(reply)
        if isinstance(action, Immediate):
            assert got.immediate_response.status.code == action.status, where
            assert await call.code() is grpc.StatusCode.OK
        else:
            assert got == oracle.reply(action, modes), where
