"""A shim that is killed in the middle of a move: the real containerd calls `delete`, and the session goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess

import pytest

from sandshift.errors import SandshiftError
from sandshift.fleet.channel import describe, make_channel
from sandshift.fleet.host import Host as Place
from sandshift.fleet.host import delete_shim
from sandshift.fleet.shim_client import Shim, connect
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from tests.containerd.hosts import DESTINATION, SOURCE, Host, migrate
from tests.containerd.pod import NOT_READY, Pod
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

SESSION = "s-1"
STOP, RESUME = m.FINALIZE_ACTION_STOP, m.FINALIZE_ACTION_RESUME
CALL_S = 60
LOOK_S = 0.1
AGAIN_S = 30


class Move:
    """One move, call by call."""

    def __init__(self, a: Host, b: Host, name: str) -> None:
        self.source = a.pod(name)
        self.container = self.source.run("one", "sh", "-c", "echo kept > /tmp/note; exec sleep 1000")
        self.destination = b.pod(name, annotations=DESTINATION)
        self.twin = self.destination.make("one", "true", annotations={SOURCE: self.container})
        self.places = {
            pod.id: Place.load(pod.daemon.folder / "sandshift.toml")
            for pod in (self.source, self.destination)
        }

    async def shim(self, pod: Pod) -> Shim:
        return await connect(self.places[pod.id], "k8s.io", pod.id)

    async def prepare(self) -> None:
        s, d = await self.shim(self.source), await self.shim(self.destination)
        export = m.PrepareAndExportSandboxRequest(session_id=SESSION)
        config = (await s.migration.prepare_and_export_sandbox(export, timeout_s=CALL_S)).config
        take = m.ImportSandboxRequest(
            session_id=SESSION, sandbox_id_or_config=self.destination.id.encode(), config=config
        )
        await d.migration.import_sandbox(take, timeout_s=CALL_S)
        await asyncio.to_thread(self.destination.cri.start_container, container_id=self.twin)
        await d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=SESSION), timeout_s=CALL_S)
        await s.close()
        await d.close()

    async def connect(self) -> None:
        channel = await make_channel(self.places[self.source.id], self.places[self.destination.id])
        for pod, end in ((self.destination, channel.destination), (self.source, channel.source)):
            shim = await self.shim(pod)
            request = m.CreateDuplicateSocketRequest(session_id=SESSION, protocol_info=describe(end))
            await shim.migration.create_duplicate_socket(request, timeout_s=CALL_S)
            await shim.close()
        channel.close()

    async def transfer(self) -> None:
        s, d = await self.shim(self.source), await self.shim(self.destination)
        request = m.TransferSandboxRequest(session_id=SESSION)
        await asyncio.gather(*(each.migration.transfer_sandbox(request, timeout_s=CALL_S) for each in (s, d)))
        async for told in d.notifications(SESSION):
            if told.notification.phase == o.PHASE_DONE:
                break
        await s.close()
        await d.close()

    async def kill(self, pod: Pod) -> None:
        """SIGKILL the pod's shim; returns when containerd's `delete` has brought another that has the session."""
        pid = pod.shim_pid()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(AGAIN_S):
            while True:
                try:
                    shim = await self.shim(pod)
                    status = await shim.status()
                    await shim.close()
                except SandshiftError:
                    status = None
                if status is not None and status.shim_pid != pid and status.session.active:
                    return
                await asyncio.sleep(LOOK_S)

    async def finalize(self, pod: Pod, action: m.FinalizeAction.ValueType) -> None:
        shim = await self.shim(pod)
        request = m.FinalizeSandboxRequest(session_id=SESSION, action=action)
        await shim.migration.finalize_sandbox(request, timeout_s=CALL_S)
        await shim.migration.cleanup(m.CleanupRequest(session_id=SESSION), timeout_s=CALL_S)
        await shim.close()

    async def vm_state(self, pod: Pod) -> str:
        shim = await self.shim(pod)
        try:
            return (await shim.status()).vm_state
        finally:
            await shim.close()

    async def end(self) -> None:
        for pod in (self.source, self.destination):
            await asyncio.to_thread(pod.end)
            await delete_shim(self.places[pod.id], "k8s.io", pod.id)


def end_of(coordinator: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = coordinator.communicate(timeout=CALL_S)
    return coordinator.returncode, (out + err).decode()


@pytest.mark.parametrize("phase", ["exported", "connected"])
async def test_a_source_whose_shim_is_killed_before_the_transfer_runs_on_when_it_is_undone(
    a: Host, b: Host, phase: str
) -> None:
    move = await asyncio.to_thread(Move, a, b, f"undone-{phase}")
    machine = move.source.vm_pid()
    await move.prepare()
    if phase == "connected":
        await move.connect()
    await move.kill(move.source)
    assert move.source.vm_pid() == machine
    assert await move.vm_state(move.source) == "running"
    await move.finalize(move.source, RESUME)
    await move.finalize(move.destination, STOP)
    assert await move.vm_state(move.source) == "running"
    assert move.source.vm_pid() == machine
    await move.end()


async def test_a_source_whose_shim_is_killed_after_the_transfer_hands_over_all_the_same(
    a: Host, b: Host
) -> None:
    move = await asyncio.to_thread(Move, a, b, "moved")
    await move.prepare()
    await move.connect()
    await move.transfer()
    await move.kill(move.source)
    ended = await asyncio.to_thread(end_of, migrate(move.source, move.destination, "--session", SESSION))
    assert ended[0] == 0, ended
    assert await move.vm_state(move.destination) == "running"
    assert await move.vm_state(move.source) == "stopped"
    answer = await asyncio.to_thread(move.destination.ask, move.twin, "cat", "/tmp/note")
    assert answer.stdout == b"kept\n"
    async with asyncio.timeout(AGAIN_S):
        while move.source.state() != NOT_READY:
            await asyncio.sleep(LOOK_S)
    await move.end()


async def test_a_destination_whose_shim_is_killed_after_the_transfer_leaves_exactly_one_runner(
    a: Host, b: Host
) -> None:
    move = await asyncio.to_thread(Move, a, b, "either")
    await move.prepare()
    await move.connect()
    await move.transfer()
    await move.kill(move.destination)
    code, said = await asyncio.to_thread(end_of, migrate(move.source, move.destination, "--session", SESSION))
    assert code in {0, 1}, said
    states = {pod.id: await move.vm_state(pod) for pod in (move.source, move.destination)}
    assert list(states.values()).count("running") == 1, (said, states)
    assert states[move.destination.id if code == 0 else move.source.id] == "running", (said, states)
    await move.end()
