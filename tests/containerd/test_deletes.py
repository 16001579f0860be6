"""A shim that is killed in a phase of a move: the real containerd calls `delete`, and the session goes on to one runner.

A kill ends the containerd's way to that pod: it shows it as not ready, and removes it without an error. The shim that `delete`
brought back has the session; what drives the move speaks to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from sandshift.errors import SandshiftError
from sandshift.fleet.channel import describe, make_channel
from sandshift.fleet.host import Host as Place
from sandshift.fleet.host import delete_shim
from sandshift.fleet.launch import logs, run_process
from sandshift.fleet.shim_client import Shim, connect
from sandshift.session.journal import replay
from sandshift.shim.migration.books import HEARD_NOTE
from sandshift.shim.places import Places
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o
from tests.containerd.daemon import eventually, mounts_below
from tests.containerd.hosts import DESTINATION, SOURCE, Host, migrate
from tests.containerd.pod import NOT_READY, Pod
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

STOP, RESUME = m.FINALIZE_ACTION_STOP, m.FINALIZE_ACTION_RESUME
CALL_S = 60
LOOK_S = 0.1
AGAIN_S = 30
SLOWLY = "\n[migration]\nbandwidth_mib_per_s = 24\n"
"""So that a transfer is still under way when the kill comes. What is asserted holds if it is over by then, too."""
STARTED = {"transferring": o.PHASE_TRANSFER_IN_PROGRESS, "blackout": o.PHASE_BLACKOUT_STARTED}
COUNT = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 10[0]0'"


class Move:
    """One move, call by call."""

    def __init__(self, a: Host, b: Host, name: str) -> None:
        self.b, self.name = b, name
        self.source = a.pod(name)
        self.container = self.source.run("one", "sh", "-c", "echo kept > /tmp/note; exec sleep 1000")
        self.places = {self.source.id: Place.load(a.daemon.folder / "sandshift.toml")}
        self.session, self._sessions = "", 0
        self._moving: list[asyncio.Task[object]] = []
        self.add_destination()

    def add_destination(self) -> None:
        """A pod that waits. A containerd is done with one whose shim was killed."""
        self._sessions += 1
        self.session = f"s-{self._sessions}"
        self.destination = self.b.pod(self.name, annotations=DESTINATION)
        self.twin = self.destination.make("one", "true", annotations={SOURCE: self.container})
        self.places[self.destination.id] = Place.load(self.b.daemon.folder / "sandshift.toml")

    async def shim(self, pod: Pod) -> Shim:
        return await connect(self.places[pod.id], "k8s.io", pod.id)

    async def reach(self, phase: str) -> None:
        """Go on from the beginning, up to and with `phase`."""
        steps = {
            "exported": self._export,
            "imported": self._import,
            "prepared": self._prepare,
            "connected": self._connect,
            **dict.fromkeys(STARTED, lambda: self._start(STARTED[phase])),
            "transferred": self._transfer,
            "finalized": lambda: self._finalize(self.destination, RESUME, self.source, STOP),
            "cleaned": lambda: self.clean_up(self.source, self.destination),
        }
        for name, step in steps.items():
            if name == phase or name not in STARTED:
                await step()
            if name == phase:
                return

    async def _export(self) -> None:
        shim = await self.shim(self.source)
        export = m.PrepareAndExportSandboxRequest(session_id=self.session)
        self._config = (await shim.migration.prepare_and_export_sandbox(export, timeout_s=CALL_S)).config
        await shim.close()

    async def _import(self) -> None:
        shim = await self.shim(self.destination)
        take = m.ImportSandboxRequest(
            session_id=self.session, sandbox_id_or_config=self.destination.id.encode(), config=self._config
        )
        await shim.migration.import_sandbox(take, timeout_s=CALL_S)
        await shim.close()

    async def _prepare(self) -> None:
        await asyncio.to_thread(self.destination.cri.start_container, container_id=self.twin)
        shim = await self.shim(self.destination)
        await shim.migration.prepare_sandbox(
            m.PrepareSandboxRequest(session_id=self.session), timeout_s=CALL_S
        )
        await shim.close()

    async def _connect(self) -> None:
        channel = await make_channel(self.places[self.source.id], self.places[self.destination.id])
        for pod, end in ((self.destination, channel.destination), (self.source, channel.source)):
            shim = await self.shim(pod)
            request = m.CreateDuplicateSocketRequest(session_id=self.session, protocol_info=describe(end))
            await shim.migration.create_duplicate_socket(request, timeout_s=CALL_S)
            await shim.close()
        channel.close()

    async def _start(self, until: o.Phase.ValueType) -> None:
        """The transfer goes on behind: whoever called it has gone with the shim that is killed."""
        s, d = await self.shim(self.source), await self.shim(self.destination)
        request = m.TransferSandboxRequest(session_id=self.session)
        self._moving = [
            asyncio.ensure_future(each.migration.transfer_sandbox(request, timeout_s=CALL_S))
            for each in (s, d)
        ]
        async with contextlib.aclosing(s.notifications(self.session)) as told:
            async for one in told:
                if one.notification.phase in (until, o.PHASE_DONE):
                    return

    async def _transfer(self) -> None:
        s, d = await self.shim(self.source), await self.shim(self.destination)
        request = m.TransferSandboxRequest(session_id=self.session)
        await asyncio.gather(*(each.migration.transfer_sandbox(request, timeout_s=CALL_S) for each in (s, d)))
        async with contextlib.aclosing(d.notifications(self.session)) as notifications:
            async for told in notifications:
                if told.notification.phase == o.PHASE_DONE:
                    break
        await s.close()
        await d.close()

    def is_heard(self) -> bool:
        """The destination has noted that it has heard the source: it may ask for the right in its next life too."""
        config = self.places[self.destination.id].config
        journal = Places.of(config, "k8s.io", self.destination.id).journal_file
        return HEARD_NOTE in replay(journal.read_bytes()).state.notes

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

    async def undo(self, *pods: Pod) -> None:
        """The way back, before anything has moved."""
        await self._finalize(
            *(word for pod in pods for word in (pod, RESUME if pod is self.source else STOP))
        )
        await self.clean_up(*pods)

    async def _finalize(self, *pods_and_actions: object) -> None:
        for pod, action in zip(pods_and_actions[::2], pods_and_actions[1::2], strict=True):
            shim = await self.shim(pod)  # type: ignore[arg-type]
            request = m.FinalizeSandboxRequest(session_id=self.session, action=action)  # type: ignore[arg-type]
            await shim.migration.finalize_sandbox(request, timeout_s=CALL_S)
            await shim.close()

    async def clean_up(self, *pods: Pod) -> None:
        for pod in pods:
            shim = await self.shim(pod)
            await shim.migration.cleanup(m.CleanupRequest(session_id=self.session), timeout_s=CALL_S)
            await shim.close()

    async def coordinate(self) -> tuple[int, str]:
        """Whoever drives the move calls again with the session's id: its exit code and what it says."""
        ended = await asyncio.to_thread(
            end_of, migrate(self.source, self.destination, "--session", self.session)
        )
        await asyncio.gather(*self._moving, return_exceptions=True)
        return ended

    async def runner(self) -> Pod:
        """The one side whose guest runs, with all that ran in it."""
        states = {pod.id: await self.vm_state(pod) for pod in (self.source, self.destination)}
        running = [pod for pod in (self.source, self.destination) if states[pod.id] == "running"]
        assert len(running) == 1, states
        assert await self.said(running[0], COUNT) == "sleep 1000\n"
        return running[0]

    async def said(self, pod: Pod, script: str) -> str:
        """What a script in the guest writes: also where containerd has no way to it any more."""
        shim = await self.shim(pod)
        name = f"look-{self.session}"
        await run_process(shim, ("sh", "-c", script), process_id=name)
        async with asyncio.timeout(CALL_S):
            data = b"".join([piece.data async for piece in logs(shim, name, stream=1, follow=True)])
        await shim.close()
        return data.decode()

    async def vm_state(self, pod: Pod) -> str:
        shim = await self.shim(pod)
        try:
            return (await shim.status()).vm_state
        finally:
            await shim.close()

    async def end_destination(self) -> None:
        await self._end(self.destination)

    async def end(self) -> None:
        await self._end(self.source)
        await self._end(self.destination)

    async def _end(self, pod: Pod) -> None:
        """As kubelet removes it: no step fails, and nothing of it stays with containerd, nor a machine."""
        await asyncio.to_thread(pod.end)
        await delete_shim(self.places[pod.id], "k8s.io", pod.id)
        daemon = pod.daemon
        for listed in (("task", "ls"), ("container", "ls")):
            assert pod.id.encode() not in daemon.ctr(*listed).stdout
        assert not [mount for mount in mounts_below(daemon.folder) if pod.id in mount]
        assert not (daemon.folder / "s" / "k8s.io" / pod.id / "vm").exists()


def end_of(coordinator: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = coordinator.communicate(timeout=CALL_S)
    return coordinator.returncode, (out + err).decode()


@pytest.fixture
def slow(a: Host) -> Iterator[None]:
    """Pods that are made meanwhile move slowly."""
    file = a.daemon.folder / "sandshift.toml"
    text = file.read_text()
    file.write_text(text + SLOWLY)
    yield
    file.write_text(text)


def not_ready(pod: Pod) -> bool:
    return pod.state() == NOT_READY


@pytest.mark.parametrize("phase", ["exported", "connected"])
async def test_a_source_whose_shim_is_killed_before_the_transfer_runs_on_when_it_is_undone(
    a: Host, b: Host, phase: str
) -> None:
    move = await asyncio.to_thread(Move, a, b, f"undone-{phase}")
    machine = move.source.vm_pid()
    await move.reach(phase)
    await move.kill(move.source)
    assert move.source.vm_pid() == machine
    assert await move.vm_state(move.source) == "running"
    await move.undo(*((move.source,) if phase == "exported" else (move.source, move.destination)))
    assert await move.runner() is move.source
    assert move.source.vm_pid() == machine
    await move.end()


async def test_a_destination_whose_shim_is_killed_leaves_the_guest_where_it_is_until_all_of_it_has_come(
    a: Host, b: Host
) -> None:
    move = await asyncio.to_thread(Move, a, b, "phases")
    for phase in ("imported", "prepared", "connected"):
        await move.reach(phase)
        await move.kill(move.destination)
        await move.undo(move.source, move.destination)
        assert await move.runner() is move.source, phase
        await asyncio.to_thread(eventually, lambda: not_ready(move.destination))
        await move.end_destination()
        await asyncio.to_thread(move.add_destination)
    await move.reach("transferred")
    await asyncio.to_thread(eventually, move.is_heard)
    await move.kill(move.destination)
    code, said = await move.coordinate()
    assert code == 0, said
    assert await move.runner() is move.destination
    await move.end()


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("phase", list(STARTED))
@pytest.mark.usefixtures("slow")
async def test_a_shim_that_is_killed_while_the_guest_is_on_its_way_leaves_exactly_one_runner(
    a: Host, b: Host, phase: str, side: str
) -> None:
    move = await asyncio.to_thread(Move, a, b, f"{phase}-{side}")
    await move.reach(phase)
    await move.kill(move.source if side == "source" else move.destination)
    code, said = await move.coordinate()
    assert code in {0, 1}, said
    assert await move.runner() is (move.source if code else move.destination), said
    await move.end()


async def test_a_source_whose_shim_is_killed_after_the_transfer_hands_over_all_the_same(
    a: Host, b: Host
) -> None:
    move = await asyncio.to_thread(Move, a, b, "moved")
    await move.reach("transferred")
    await move.kill(move.source)
    code, said = await move.coordinate()
    assert code == 0, said
    assert await move.runner() is move.destination
    answer = await asyncio.to_thread(move.destination.ask, move.twin, "cat", "/tmp/note")
    assert answer.stdout == b"kept\n"
    await asyncio.to_thread(eventually, lambda: not_ready(move.source))
    await move.end()


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_a_shim_that_is_killed_when_all_is_decided_only_has_to_be_cleaned_up(
    a: Host, b: Host, side: str
) -> None:
    move = await asyncio.to_thread(Move, a, b, f"decided-{side}")
    await move.reach("finalized")
    await move.kill(move.source if side == "source" else move.destination)
    await move.clean_up(move.source, move.destination)
    assert await move.runner() is move.destination
    await move.end()


async def test_shims_that_are_killed_when_the_session_has_ended_are_removed_as_any_others(
    a: Host, b: Host
) -> None:
    move = await asyncio.to_thread(Move, a, b, "over")
    await move.reach("cleaned")
    machine = move.destination.vm_pid()
    os.kill(move.source.shim_pid(), signal.SIGKILL)
    await asyncio.to_thread(eventually, lambda: not_ready(move.source))
    assert await asyncio.to_thread(move.destination.ask, move.twin, "cat", "/tmp/note")
    os.kill(move.destination.shim_pid(), signal.SIGKILL)
    await asyncio.to_thread(eventually, lambda: not_ready(move.destination))
    assert await asyncio.to_thread(move.destination.ended, move.twin) == 255
    await asyncio.to_thread(eventually, lambda: not os.path.exists(f"/proc/{machine}/fd/0"))  # noqa: PTH110
    await move.end()
