"""The Agent service: each call checked here and handed to the part that does it. Every call may be repeated."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from typing import Final, cast

from sandshift.agent import netlink
from sandshift.agent.container_calls import ContainerCalls
from sandshift.agent.piece import EncodedPiece
from sandshift.agent.process import STDERR, STDOUT, ProcessPlan
from sandshift.agent.system import System
from sandshift.agent.table import Table
from sandshift.wire.sandshift import agent_pb2 as pb
from ttrpc import CallContext, Code, StatusError

AGENT_VERSION: Final = "0.1.0"
ENTROPY_BYTES_MIN: Final = 32
OUTPUT_MESSAGE_BYTES_MAX: Final = 256 << 10
POWER_OFF_AFTER_S: Final = 0.05
"""So that the answer gets out."""


class Agent(ContainerCalls):
    def __init__(self, table: Table, system: System) -> None:
        super().__init__(table)
        self._system = system
        self._is_personalized = False

    async def info(self, request: pb.InfoRequest, context: CallContext) -> pb.InfoResponse:
        del request, context
        # The kernel makes its boot id when it is first read. Before that, in a guest that may become a template, nobody
        # may read it: all clones would have the same.
        boot_id = self._system.boot_id() if self._is_personalized else ""
        return pb.InfoResponse(
            agent_version=AGENT_VERSION,
            boot_id=boot_id,
            kernel_release=os.uname().release,
            uptime_ns=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            realtime_ns=self._system.realtime_ns(),
            machine_id=self._system.machine_id(),
            hostname=self._system.hostname(),
            memory_total_bytes=self._system.memory_total_bytes(),
            generation_id=self._system.generation_id(),
            personalized=self._is_personalized,
        )

    async def personalize(
        self, request: pb.PersonalizeRequest, context: CallContext
    ) -> pb.PersonalizeResponse:
        del context
        if len(request.entropy) < ENTROPY_BYTES_MIN:
            raise StatusError(
                Code.INVALID_ARGUMENT,
                f"{len(request.entropy)} bytes of entropy are given, {ENTROPY_BYTES_MIN} are needed",
            )
        try:
            network = self._network(request.interfaces)
        except (ValueError, LookupError) as error:
            raise StatusError(Code.INVALID_ARGUMENT, str(error)) from error
        try:
            self._make_itself(request, network)
        except OSError as error:
            raise StatusError(
                Code.FAILED_PRECONDITION, f"the guest cannot be made itself: {error}"
            ) from error
        self._is_personalized = True
        return pb.PersonalizeResponse()

    async def set_clock(self, request: pb.SetClockRequest, context: CallContext) -> pb.SetClockResponse:
        del context
        if request.realtime_ns <= 0:
            raise StatusError(
                Code.INVALID_ARGUMENT, f"{request.realtime_ns} ns is no time to set the clock to"
            )
        return pb.SetClockResponse(offset_ns=self._step_clock(request.realtime_ns))

    async def start_process(
        self, request: pb.StartProcessRequest, context: CallContext
    ) -> pb.StartProcessResponse:
        del context
        if request.container_id:
            return pb.StartProcessResponse(pid=(await self._containers.exec(request)).pid)
        plan = ProcessPlan(
            tuple(request.args), dict(request.env), request.cwd, request.terminal, request.stdin
        )
        return pb.StartProcessResponse(pid=self._table.start(request.process_id, plan).pid)

    async def read_output(
        self, request: pb.ReadOutputRequest, context: CallContext
    ) -> AsyncIterator[pb.ReadOutputResponse]:
        del context
        output = self._table.output(request.process_id, request.stream)
        offset = request.offset
        while True:
            if not output.buffer.holds(offset):
                raise StatusError(
                    Code.OUT_OF_RANGE,
                    f"process {request.process_id} stream {request.stream}: offset {offset} is not in"
                    f" {output.buffer.acknowledged} to {output.buffer.end}",
                )
            if data := output.buffer.read(offset, OUTPUT_MESSAGE_BYTES_MAX):
                yield cast("pb.ReadOutputResponse", EncodedPiece(offset, data))
                offset += len(data)
            elif output.buffer.is_ended:
                yield pb.ReadOutputResponse(offset=offset, eof=True)
                return
            else:
                await output.wait()

    async def ack_output(self, request: pb.AckOutputRequest, context: CallContext) -> pb.AckOutputResponse:
        del context
        self._table.output(request.process_id, request.stream).acknowledge(request.offset)
        return pb.AckOutputResponse()

    async def write_input(self, request: pb.WriteInputRequest, context: CallContext) -> pb.WriteInputResponse:
        del context
        stdin = self._table.get(request.process_id).input
        if stdin is None:
            raise StatusError(
                Code.FAILED_PRECONDITION, f"process {request.process_id} was started without stdin"
            )
        try:
            return pb.WriteInputResponse(
                offset=await stdin.take(request.offset, request.data, eof=request.eof)
            )
        except ValueError as error:
            raise StatusError(Code.OUT_OF_RANGE, f"process {request.process_id}: {error}") from error

    async def wait_process(
        self, request: pb.WaitProcessRequest, context: CallContext
    ) -> pb.WaitProcessResponse:
        del context
        ended = await self._table.get(request.process_id).wait()
        return pb.WaitProcessResponse(exit_code=ended.code, exited_at_ns=ended.at_ns)

    async def signal_process(
        self, request: pb.SignalProcessRequest, context: CallContext
    ) -> pb.SignalProcessResponse:
        del context
        try:
            self._table.get(request.process_id).signal(request.signal, whole_group=request.all)
        except ValueError as error:
            raise StatusError(Code.INVALID_ARGUMENT, str(error)) from error
        return pb.SignalProcessResponse()

    async def resize_terminal(
        self, request: pb.ResizeTerminalRequest, context: CallContext
    ) -> pb.ResizeTerminalResponse:
        del context
        try:
            self._table.get(request.process_id).resize_terminal(request.columns, request.rows)
        except ValueError as error:
            raise StatusError(Code.FAILED_PRECONDITION, f"process {request.process_id}: {error}") from error
        return pb.ResizeTerminalResponse()

    async def forget_process(
        self, request: pb.ForgetProcessRequest, context: CallContext
    ) -> pb.ForgetProcessResponse:
        del context
        self._table.forget(request.process_id)
        return pb.ForgetProcessResponse()

    async def list_processes(
        self, request: pb.ListProcessesRequest, context: CallContext
    ) -> pb.ListProcessesResponse:
        del request, context
        listed = []
        for process_id, process in self._table.items():
            ends = {stream: output.buffer.end for stream, output in process.outputs.items()}
            listed.append(
                pb.ProcessInfo(
                    process_id=process_id,
                    pid=process.pid,
                    args=process.plan.args,
                    exited=process.exit is not None,
                    exit_code=process.exit.code if process.exit is not None else 0,
                    stdout_offset=ends.get(STDOUT, 0),
                    stderr_offset=ends.get(STDERR, 0),
                )
            )
        return pb.ListProcessesResponse(processes=listed)

    async def power_off(self, request: pb.PowerOffRequest, context: CallContext) -> pb.PowerOffResponse:
        del request, context
        asyncio.get_running_loop().call_later(POWER_OFF_AFTER_S, self._system.power_off)
        return pb.PowerOffResponse()

    def _network(self, interfaces: Iterable[pb.NetworkInterface]) -> list[bytes]:
        """The messages for the kernel; everything is checked before anything is changed."""
        messages = [netlink.link(1)]  # the loopback interface is always the first
        for card in interfaces:
            index = self._system.card_index(card.index)
            messages.append(netlink.link(index, mac=card.mac, mtu=card.mtu))
            messages += [netlink.address(index, text, with_route=not card.routes) for text in card.addresses]
            # Those on the link first: the others' gateways are reached by them.
            for way in sorted(card.routes, key=lambda way: bool(way.gateway)):
                messages.append(
                    netlink.route(
                        index, way.destination, gateway=way.gateway, source=way.source, on_link=way.on_link
                    )
                )
            if card.gateway and not card.routes:
                messages.append(netlink.default_route(index, card.gateway))
        return messages

    def _make_itself(self, request: pb.PersonalizeRequest, network: list[bytes]) -> None:
        # Randomness first: the kernel's boot id and all that follows is made from it.
        self._system.add_entropy(request.entropy)
        if request.realtime_ns:
            self._step_clock(request.realtime_ns)
        if request.machine_id:
            self._system.set_machine_id(request.machine_id)
        if request.hostname:
            self._system.set_hostname(request.hostname)
        self._system.set_nameservers(request.nameservers)
        self._system.apply_network(network)

    def _step_clock(self, realtime_ns: int) -> int:
        """Set the clock; how far it was ahead of `realtime_ns`, ns."""
        offset_ns = self._system.realtime_ns() - realtime_ns
        self._system.set_realtime_ns(realtime_ns)
        return offset_ns
