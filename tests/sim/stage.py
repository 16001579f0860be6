"""What a history runs on: everything that would bring in chance, the clock, threads or other processes is replaced.

The coordinator, the shims, ttrpc and the protocol are the real ones; `Stage` stands where the operating system is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from sandshift.fleet import calls, shim_client
from sandshift.fleet.calls import Calls
from sandshift.fleet.channel import Channel
from sandshift.fleet.host import Host
from sandshift.fleet.saga import Step as SagaStep
from sandshift.session.right import Party, RightEvent, Step
from sandshift.shim import sandbox as shim_sandbox
from sandshift.shim.migration import session as shim_session
from sandshift.vmm.fake_process import FakeProcess
from tests.sim.channel import Wire
from tests.sim.faults import THE_STOP
from tests.sim.hosts import InlineDisk, SimHost, own_processes
from tests.sim.loop import EPOCH_S, OWNER, SimLoop, owned_by
from tests.sim.witness import Witness

Handle = Callable[[Party, RightEvent], tuple[Party, tuple[Step, ...]]]
MESSAGE_SHOWN_CHARACTERS = 160


class Stage:
    """Two hosts, the wires between them, the witness and the story."""

    def __init__(self, folder: Path, random: Random, loop: SimLoop, protocol: Handle) -> None:
        self.folder = folder
        self.random = random
        self.loop = loop
        self.protocol = protocol
        self.story: list[str] = []
        self.witness = Witness()
        self.source = SimHost(folder, "source", random, self.tell)
        self.destination = SimHost(folder, "destination", random, self.tell)
        self.wires: list[Wire] = []
        self.held: dict[str, list[Channel]] = {}
        """The ends of wires that a coordinator has in its hands."""
        self.defects: list[str] = []
        self.at_end: Callable[[], None] = lambda: None
        self.replacements_more: list[tuple[Any, str, Any]] = []
        self.on_call: Callable[[str], None] = lambda _step: None
        """Told of every call that a coordinator makes."""
        self.latency_s = random.choice((0.0, 0.0005, 0.005, 0.05))
        self.wire_delay_s = random.choice((0.0, 0.0002, 0.002, 0.02))

    @property
    def hosts(self) -> tuple[SimHost, SimHost]:
        return self.source, self.destination

    def tell(self, what: str) -> None:
        what = what.replace(str(self.folder), "")  # another one every time
        self.story.append(f"{(self.loop.time() - EPOCH_S) * 1e3:10.3f} ms  {what}")

    def host_of(self, host: Host) -> SimHost:
        return self.source if host is self.source.fleet else self.destination

    def saw(self, process: FakeProcess, running: bool) -> None:
        host = next(one.name for one in self.hosts if one.world.log is process._log)
        self.tell(f"{host}: the guest {'RUNS' if running else 'is stopped'}")
        if not running:
            self.on_call(THE_STOP)
        before = len(self.witness.violations)
        self.witness.saw(process, host, running=running)
        for violation in self.witness.violations[before:]:
            self.tell(f"VIOLATION {violation}")

    # What the coordinator does outside of its process

    async def start_shim(self, host: Host, _namespace: str, _sandbox_id: str) -> str:
        return await self.host_of(host).start_shim()

    async def delete_shim(self, host: Host, _namespace: str, _sandbox_id: str) -> None:
        await self.host_of(host).delete_shim()

    async def make_channel(self, _source: Host, _destination: Host) -> Channel:
        await asyncio.sleep(self.latency())
        with owned_by("world"):
            wire = Wire(self.wire_delay_s)
        self.wires.append(wire)
        self.held.setdefault(OWNER.get(), []).append(wire.channel)
        return wire.channel

    def kill_coordinator(self, owner: str) -> None:
        self.tell(f"FAULT {owner} is killed")
        self.loop.kill(owner)
        for channel in self.held.pop(owner, []):
            channel.close()

    def latency(self) -> float:
        return self.random.uniform(0, self.latency_s)

    # Setting it up and clearing it away

    @contextlib.contextmanager
    def set_up(self) -> Generator[None]:
        with contextlib.ExitStack() as stack:
            for target, name, instead in self._replacements():
                stack.enter_context(mock.patch.object(target, name, instead))
            handler = _Defects(self.defects)
            for name in ("sandshift", "ttrpc"):
                log = logging.getLogger(name)
                log.addHandler(handler)
                stack.callback(log.removeHandler, handler)
                stack.enter_context(mock.patch.object(log, "propagate", new=False))
            yield

    def _replacements(self) -> list[tuple[Any, str, Any]]:
        chance, loop = self.random, self.loop
        randomness = [
            (secrets, "token_bytes", lambda n=32: chance.randbytes(n)),
            (secrets, "token_hex", lambda n=32: chance.randbytes(n).hex()),
            (secrets, "randbits", chance.getrandbits),
            (uuid, "uuid4", lambda: uuid.UUID(int=chance.getrandbits(128), version=4)),
            (time, "monotonic", loop.time),
            (time, "time", loop.time),
            (time, "time_ns", lambda: int(loop.time() * 1e9)),
            (os, "fsync", lambda _fd: None),
            (os, "fdatasync", lambda _fd: None),
        ]
        seams = [
            (calls, "start_shim", self.start_shim),
            (calls, "delete_shim", self.delete_shim),
            (calls, "make_channel", self.make_channel),
            (shim_client, "start_shim", self.start_shim),
            (shim_client, "delete_shim", self.delete_shim),
            (shim_client.Shim, "said", _slow(shim_client.Shim.said, self)),
            (Calls, "make", _told(Calls.make, self)),
            (shim_session, "handle", self.protocol),
            (shim_sandbox, "Disk", lambda: InlineDisk(chance)),
        ]
        processes = [(FakeProcess, name, instead) for name, instead in own_processes(self.saw).items()]
        return [*randomness, *seams, *processes, *self.replacements_more]

    @property
    def wrong(self) -> list[str]:
        """What must never be, wherever it was seen."""
        logged = [f"a defect was logged: {defect}" for defect in self.defects]
        return [
            *self.witness.violations,
            *logged,
            *(problem for host in self.hosts for problem in host.problems),
        ]

    async def end(self) -> None:
        self.at_end()
        for host in self.hosts:
            host.end()
        for wire in self.wires:
            if not wire.cut_off:
                wire.cut()
            wire.channel.close()


class _Defects(logging.Handler):
    """What the shims and the coordinator log as a defect of theirs."""

    def __init__(self, defects: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._defects = defects

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self._defects.append(text)


def _slow(said: Any, stage: Stage) -> Any:
    async def call(shim: Any, answer: Any) -> Any:
        if stage.latency_s:
            await asyncio.sleep(stage.latency())
        done = await said(shim, answer)
        if stage.latency_s:
            await asyncio.sleep(stage.latency())
        return done

    return call


def _told(make: Any, stage: Stage) -> Any:
    async def call(self: Calls, step: SagaStep, **more: Any) -> None:
        who = OWNER.get()
        stage.tell(f"{who}: {step}")
        stage.on_call(str(step))
        try:
            await make(self, step, **more)
        except BaseException as error:
            stage.tell(
                f"{who}: {step} -> {type(error).__name__} {str(error).replace(str(stage.folder), '')[:MESSAGE_SHOWN_CHARACTERS]}"
            )
            raise
        stage.tell(f"{who}: {step} -> OK")

    return call


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
