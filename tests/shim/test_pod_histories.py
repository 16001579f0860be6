"""Moves of a pod whose shims are killed anywhere, turned back and begun again: output stays one unbroken stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

import ttrpc
from sandshift.config import Limits
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.wire.containerd import task_pb2 as pb
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import TwoHosts, two_hosts
from tests.shim.pod import Bundle, bundles, lines, run

RESUME, STOP = m.FINALIZE_ACTION_RESUME, m.FINALIZE_ACTION_STOP
MANY = 9 * 60
NAMES = ("web", "db")
HANDOVER_FRAME_S = 0.5
"""How long a shim asks the other in vain, where they lost each other: waited for once in every such history."""


class History:
    """One pod, moved as `random` says."""

    def __init__(self, hosts: TwoHosts, random: Random, make, make_here) -> None:
        self.hosts = hosts
        self.random = random
        self.make_here = make_here
        self.there: list[Bundle] = [make(name, ["flood"]) for name in NAMES]
        self.here: list[Bundle] = []
        self.attempt = 0
        self.streams: list[tuple[bytes, bytes]] = []
        """What came of each container before the move and after it."""

    async def perhaps_kill(self) -> None:
        """One shim, both or neither, and their callers connect again."""
        hosts = self.hosts
        for host in (hosts.source, hosts.destination):
            if self.random.random() < 0.25:
                await host.stop()
                await host.start()
        await hosts.reconnect()

    async def begin(self) -> None:
        for bundle in self.there:
            await run(self.hosts.s.task, bundle)
            bundle.stdout.hold()
            await bundle.stdout.until(MANY)

    async def come(self, *, until: int) -> None:
        """The first `until` steps of a move."""
        self.attempt += 1
        hosts = self.hosts
        hosts.session = f"session-{self.attempt}"
        steps = (self._import, self._create, self._prepare, hosts.connect, hosts.transfer)
        for step in steps[:until]:
            await step()
            await self.perhaps_kill()

    async def _import(self) -> None:
        await self.hosts.import_config((await self.hosts.export()).config)

    async def _create(self) -> None:
        self.here = [
            self.make_here(f"{name}-{self.attempt}", [], annotations={SOURCE_CONTAINER_ANNOTATION: name})
            for name in NAMES
        ]
        for bundle in self.here:
            await run(self.hosts.d.task, bundle)
            bundle.stdout.hold()

    async def _prepare(self) -> None:
        request = m.PrepareSandboxRequest(session_id=self.hosts.session)
        await self.hosts.d.migration.prepare_sandbox(request, timeout_s=10)

    async def turn_back(self) -> None:
        hosts = self.hosts
        for client in (hosts.s, hosts.d):
            await client.migration.cancel(m.CancelRequest(session_id=hosts.session), timeout_s=20)
        await self.finalize("s", RESUME)
        await self.perhaps_kill()
        await self.finalize("d", STOP)
        await self.clean_up()
        for bundle in self.here:
            ended = await hosts.d.task.wait(pb.WaitRequest(id=bundle.container_id), timeout_s=5)
            assert ended.exit_status == 255
            await hosts.d.task.delete(pb.DeleteRequest(id=bundle.container_id), timeout_s=10)
            assert bundle.stdout.data == b"", "nothing ran there"
        self.here = []
        for bundle in self.there:
            await bundle.stdout.until(len(bundle.stdout.data) + MANY)

    async def finish(self) -> None:
        await self.finalize("d", RESUME)
        await self.perhaps_kill()
        await self.finalize("s", STOP)
        await self.clean_up()
        for before, after in zip(self.there, self.here, strict=True):
            before.stdout.let_go()
            first = await before.stdout.all()
            self.streams.append((first, await after.stdout.until(2 * MANY)))

    async def finalize(self, side: str, action: int) -> None:
        """As an orchestrator does it: the other side's statement is carried where the shims do not find each other."""
        hosts = self.hosts
        for _ in range(4):
            mine, other = (hosts.s, hosts.d) if side == "s" else (hosts.d, hosts.s)
            receipt = (await other.status()).session.receipt
            try:
                await mine.finalize(hosts.session, action, receipt)
            except ttrpc.StatusError as error:
                if error.code is not ttrpc.Code.UNAVAILABLE:
                    raise
                with contextlib.suppress(ttrpc.StatusError):
                    # The source gives the right away once it hears that the destination is ready, and asks for it.
                    ready = (await mine.status()).session.receipt
                    await other.finalize(hosts.session, STOP if action == RESUME else RESUME, ready)
                continue
            return
        raise AssertionError("four rounds did not decide")

    async def clean_up(self) -> None:
        for client in (self.hosts.s, self.hosts.d):
            request = m.CleanupRequest(session_id=self.hosts.session)
            await client.migration.cleanup(request, timeout_s=20)


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path, Limits(handover_frame_s=HANDOVER_FRAME_S)) as both:
        yield both


@pytest.mark.parametrize("seed", range(6))
async def test_output_is_one_stream_whatever_happens_on_the_way(
    hosts: TwoHosts, tmp_path: Path, seed: int
) -> None:
    random = Random(seed)
    async with bundles(tmp_path / "there") as make, bundles(tmp_path / "here") as make_here:
        history = History(hosts, random, make, make_here)
        await history.begin()
        for _ in range(random.randrange(3)):
            await history.come(until=random.randrange(1, 6))
            await history.turn_back()
        await history.come(until=5)
        await history.finish()
        assert hosts.runners() == ["destination"]
        assert len(history.streams) == len(NAMES)
        for before, after in history.streams:
            assert len(lines(before + after)) * 9 > len(before) + 2 * MANY - 9
