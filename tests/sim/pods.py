"""What users have, in a history: a pod of several containers with exec sessions, and a containerd on either host.

A `Caller` does what containerd and who uses it do: makes the containers, gives those of the source their places at the
destination, binds exec sessions that have come, waits for every end, reads and writes all fifos. It is no part of any
shim and lives on when one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Final

import ttrpc
from sandshift.sandbox.model import SOURCE_CONTAINER_ANNOTATION
from sandshift.vmm.fake_containers import FakeTask
from sandshift.wire.containerd import sandbox_pb2
from sandshift.wire.containerd import task_pb2 as pb
from tests.shim.fake_agent import FakeGuest
from tests.shim.house import SANDBOX, HostClient
from tests.shim.pod import Containerd, exec_request
from tests.sim.loop import owned_by
from tests.sim.pod_truth import Truth
from tests.sim.stays import Fifos, Program, Stay, bundle_for

if TYPE_CHECKING:
    from tests.sim.hosts import SimHost
    from tests.sim.stage import Stage

LOOK_S: Final = 0.25
"""How often a caller looks at its shim."""
EVENTS_S: Final = 5.0
"""What a shim has to say is said by then, if its containerd is there."""
CALL_S: Final = 20.0
AGENT_LOOKS_S: Final = (0.01, 0.05, 0.05, 0.2, 0.2, 0.2)
"""How late the agent of a fake guest answers."""
AGENT_WAYS_S: Final = (0.0, 0.002, 0.02)
RATES: Final = ("50", "500", "5000")
"""Lines per second."""
CONTAINERS_MAX: Final = 3
EXECS_MAX: Final = 2
KILLS: Final = 15
OWNED_SHARE: Final = 0.5
"""Of the pods whose destination somebody else makes and ends than the coordinator."""
UNSHARED: Final = 0x5EED
"""Pods draw from a sequence of their own, so that a seed's faults do not depend on its pod."""
POD_OF: Final = 3


def has_pod(seed: int) -> bool:
    """One seed of three; the others are bare sandboxes, which take a third of the time."""
    return seed % POD_OF == 0


@dataclass(frozen=True, slots=True)
class Doing:
    """Something that users do in the middle of it."""

    at_s: float
    program: Program | None
    """Gets a SIGTERM; None: containerd is away for a while."""
    host: int
    away_s: float


class Pods:
    """The pod of one history and all that anybody was told of it."""

    def __init__(self, stage: Stage, seed: int) -> None:
        self.stage = stage
        self.random = Random((seed << 16) ^ UNSHARED)
        self.programs = _programs(self.random)
        self.stays: list[Stay] = []
        self.callers = [Caller(self, host) for host in stage.hosts]
        self.violations: list[str] = []
        self.truth = Truth(stage)
        self._doings = _doings(self.random, list(self.programs.values()))
        self._look_s = self.random.choice(AGENT_LOOKS_S)
        self.owned = self.random.random() < OWNED_SHARE
        """containerd owns the pods on both sides: it makes the one that waits, and clears away the one that is left."""
        self._way_s = self.random.choice(AGENT_WAYS_S)
        self._tasks: set[asyncio.Task[Any]] = set()

    # Who is who

    def stays_of(self, base: str) -> list[Stay]:
        return [stay for stay in self.stays if stay.base == base]

    def base_of(self, container_id: str) -> str:
        return next(stay.base for stay in self.stays if stay.container_id == container_id)

    def execs_of(self, base: str) -> list[Program]:
        return [one for one in self.programs.values() if one.base == base and one.exec_id]

    def caller_of(self, host: str) -> Caller:
        return next(one for one in self.callers if one.host.name == host)

    @property
    def ownership(self) -> dict[str, Any]:
        """What a coordinator is told of it."""
        return {"destination_id": SANDBOX, "close_source": False} if self.owned else {}

    def wrong(self, what: str) -> None:
        if what not in self.violations:
            self.violations.append(what)
            self.stage.tell(f"VIOLATION {what}")

    # Beginning and end

    async def boot(self) -> None:
        """The sandbox runs on the source: make its containers and exec sessions."""
        for program in self.programs.values():
            self.stage.tell(f"pod: {program}")
        for caller in self.callers:
            await caller.open()
        await self.callers[0].make()
        if self.owned:
            await self.callers[1].await_sandbox()
        for caller in self.callers:
            self.spawn(caller.attend())
        for doing in self._doings:
            self.spawn(self._do(doing))

    async def _do(self, doing: Doing) -> None:
        await asyncio.sleep(doing.at_s)
        caller = self.callers[doing.host]
        if doing.program is None:
            self.stage.tell(f"containerd of {caller.host.name} is away")
            caller.was_away = True
            await caller.containerd.stop()
            await asyncio.sleep(doing.away_s)
            await caller.containerd.start()
            return
        await caller.kill(doing.program, KILLS)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        with owned_by("world"):
            task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    def replacements(self) -> list[tuple[Any, str, Any]]:
        return [
            (FakeGuest, "look_s", self._look_s),
            (FakeGuest, "way_s", self._way_s),
            (FakeTask, "end", self.truth.watched()),
        ]

    def end(self) -> None:
        for stay in self.stays:
            for fifos in stay.fifos.values():
                fifos.close()


class Caller:
    """containerd on one host, and who uses it."""

    def __init__(self, pods: Pods, host: SimHost) -> None:
        self.pods = pods
        self.host = host
        self.containerd = Containerd(pods.stage.folder / f"{host.name}-events.sock")
        host.events_path = self.containerd.address
        self.client: HostClient | None = None
        self.was_away = False
        self._waits: dict[tuple[Stay, str], asyncio.Task[None]] = {}
        self._told_again: set[tuple[Stay, str]] = set()

    @property
    def stays(self) -> list[Stay]:
        """Those that its shim may know."""
        return [stay for stay in self.pods.stays if stay.host == self.host.name and not stay.gone]

    def here(self, base: str) -> Stay | None:
        """The newest of that container."""
        return next((stay for stay in reversed(self.stays) if stay.base == base), None)

    async def open(self) -> None:
        with owned_by("world"):
            await self.containerd.start()

    # The pod is made

    async def make(self) -> None:
        client = await self.host.client()
        for program in self.pods.programs.values():
            if not program.exec_id:
                stay = self._stay(program, "", program.base, {})
                await client.task.create(stay.fifos[""].bundle.create_request(), timeout_s=CALL_S)
                stay.made = True
                await client.task.start(pb.StartRequest(id=stay.container_id), timeout_s=CALL_S)
        for stay in list(self.stays):
            for program in self.pods.execs_of(stay.base):
                await self._exec(client, stay, program)
        await client.connection.close()

    async def await_sandbox(self) -> None:
        """Make the pod that waits for one to come."""
        await self.host.start_shim()
        client = await self.host.client()
        await client.await_sandbox()
        await client.connection.close()

    async def clear_away(self) -> None:
        """The guest is not here: delete what it left, as containerd does when it has heard that all has ended."""
        host, stage = self.host, self.pods.stage
        if host.places.unfinished_session() or not (host.owner or host.places.run_dir.exists()):
            return
        try:
            await host.start_shim()
            client = await host.client()
            for stay in self.stays:
                if stay.made:
                    await self._delete(client, stay)
            request = sandbox_pb2.ShutdownSandboxRequest(sandbox_id=SANDBOX)
            await client.sandbox.shutdown_sandbox(request, timeout_s=CALL_S)
            await client.connection.close()
        except (ttrpc.StatusError, OSError) as error:
            self.pods.wrong(f"what the guest left on {host.name} cannot be cleared away: {error}")
        await asyncio.sleep(EVENTS_S)
        await host.delete_shim()
        stage.tell(f"containerd@{host.name}: the pod is cleared away")

    async def _delete(self, client: HostClient, stay: Stay) -> None:
        for exec_id in sorted(stay.bound):
            request = pb.WaitRequest(id=stay.container_id, exec_id=exec_id)
            self._ended(stay, exec_id, (await client.task.wait(request, timeout_s=CALL_S)).exit_status)
            gone = pb.DeleteRequest(id=stay.container_id, exec_id=exec_id)
            await client.task.delete(gone, timeout_s=CALL_S)
        ended = await client.task.wait(pb.WaitRequest(id=stay.container_id), timeout_s=CALL_S)
        self._ended(stay, "", ended.exit_status)
        deleted = await client.task.delete(pb.DeleteRequest(id=stay.container_id), timeout_s=CALL_S)
        if deleted.exit_status != ended.exit_status:
            self.pods.wrong(
                f"{stay} ended with {ended.exit_status} and is deleted with {deleted.exit_status}"
            )
        stay.gone = True

    def _stay(self, program: Program, session_id: str, name: str, annotations: dict[str, str]) -> Stay:
        pods = self.pods
        folder = pods.stage.folder / "bundles" / self.host.name
        bundle = bundle_for(folder, name, program, annotations=annotations)
        number = len(pods.stays)
        fifos = {"": Fifos(bundle, program, pods.random, number)}
        stay = Stay(number, self.host.name, session_id, name, program.base, fifos)
        pods.stays.append(stay)
        return stay

    async def _exec(self, client: HostClient, stay: Stay, program: Program) -> None:
        """Make an exec session, or bind the one that has come. Can be repeated."""
        if program.exec_id not in stay.fifos:
            folder = self.pods.stage.folder / "bundles" / self.host.name
            bundle = bundle_for(folder, f"{stay.container_id}.{program.exec_id}", program, annotations={})
            stay.fifos[program.exec_id] = Fifos(bundle, program, self.pods.random, stay.number)
        bundle = stay.fifos[program.exec_id].bundle
        paths = {"stdout": bundle.stdout.path, "stderr": bundle.stderr.path, "stdin": bundle.stdin}
        request = exec_request(stay.fifos[""].bundle, program.exec_id, program.args, **paths)
        with contextlib.suppress(ttrpc.StatusError):  # It was bound, and nobody heard the answer.
            await client.task.exec(request, timeout_s=CALL_S)
        start = pb.StartRequest(id=stay.container_id, exec_id=program.exec_id)
        await client.task.start(start, timeout_s=CALL_S)
        stay.bound.add(program.exec_id)

    # While it is there

    async def attend(self) -> None:
        """Task: as long as the history goes on, whatever becomes of the shim."""
        while True:
            try:
                self.client = await self.host.client()
                while True:
                    await self._look(self.client)
                    await asyncio.sleep(LOOK_S)
            except (ttrpc.StatusError, OSError, TimeoutError):
                for task in self._waits.values():
                    task.cancel()
                self._waits.clear()
                self._told_again.clear()
                if self.client is not None:
                    await self.client.connection.close()
                    self.client = None
            await asyncio.sleep(LOOK_S)

    async def _look(self, client: HostClient) -> None:
        status = await client.status()
        if status.session.active:
            for source_id in status.session.pending_containers:
                await self._patch(client, status.session.session_id, source_id)
        elif status.life == "ready":
            await self._bind(client)
        for stay in self.stays:
            for exec_id in ("", *(program.exec_id for program in self.pods.execs_of(stay.base))):
                self._wait_for(client, stay, exec_id)

    async def _patch(self, client: HostClient, session_id: str, source_id: str) -> None:
        pods = self.pods
        base = pods.base_of(source_id)
        stay = self._tried(base, session_id)
        if stay is None:
            name = f"{base}-{len(pods.stays)}"
            annotations = {SOURCE_CONTAINER_ANNOTATION: source_id}
            stay = self._stay(pods.programs[f"{base}:"], session_id, name, annotations)
        try:
            request = stay.fifos[""].bundle.create_request()
            await client.task.create(request, timeout_s=CALL_S)
            stay.made = True
            await client.task.start(pb.StartRequest(id=stay.container_id), timeout_s=CALL_S)
        except ttrpc.ConnectionClosed:
            raise
        except ttrpc.StatusError as error:
            pods.stage.tell(f"containerd@{self.host.name}: create {stay} -> {str(error)[:140]}")

    def _tried(self, base: str, session_id: str) -> Stay | None:
        """What was made, or tried, for this session and has not ended."""
        mine = [stay for stay in self.pods.stays_of(base) if stay.host == self.host.name]
        stay = mine[-1] if mine else None
        if stay is None or stay.session_id != session_id or stay.exits or (stay.gone and stay.made):
            return None
        stay.gone = False
        return stay

    async def _bind(self, client: HostClient) -> None:
        """The exec sessions of containers that have come get their callers here."""
        for stay in self.stays:
            for program in self.pods.execs_of(stay.base):
                if program.exec_id in stay.bound:
                    continue
                try:
                    await self._exec(client, stay, program)
                except ttrpc.ConnectionClosed:
                    raise
                except ttrpc.StatusError as error:
                    self.pods.stage.tell(
                        f"containerd@{self.host.name}: bind {stay} {program.exec_id} -> {str(error)[:140]}"
                    )

    # Ends

    def _wait_for(self, client: HostClient, stay: Stay, exec_id: str) -> None:
        key = (stay, exec_id)
        task = self._waits.get(key)
        if key in self._told_again or (task is not None and not task.done()):
            return
        self._waits[key] = self.pods.spawn(self._wait(client, stay, exec_id))

    async def _wait(self, client: HostClient, stay: Stay, exec_id: str) -> None:
        try:
            answer = await client.task.wait(pb.WaitRequest(id=stay.container_id, exec_id=exec_id))
        except ttrpc.ConnectionClosed:
            return
        except ttrpc.StatusError as error:
            if error.code is ttrpc.Code.NOT_FOUND and not exec_id:
                stay.gone = True
            return
        except OSError:
            return
        self._told_again.add((stay, exec_id))
        self._ended(stay, exec_id, answer.exit_status)

    def _ended(self, stay: Stay, exec_id: str, code: int) -> None:
        pods = self.pods
        what = f"{stay}{' ' + exec_id if exec_id else ''}"
        before = stay.exits.setdefault(exec_id, code)
        if before != code:
            pods.wrong(f"{what} ended with {before}, and then with {code}")
        pods.stage.tell(f"containerd@{self.host.name}: {what} has ended with {code}")
        if why := pods.truth.wrong_exit(stay, exec_id, code):
            pods.wrong(f"{what} ended with {code}: {why}")
        if exec_id in stay.fifos:
            stay.fifos[exec_id].stop_feeding()

    async def kill(self, program: Program, number: int) -> None:
        stay = self.here(program.base)
        if stay is None or self.client is None:
            return
        request = pb.KillRequest(id=stay.container_id, exec_id=program.exec_id, signal=number)
        said = "OK"
        try:
            await self.client.task.kill(request, timeout_s=CALL_S)
        except (ttrpc.StatusError, OSError) as error:
            said = str(error)[:120]
        self.pods.stage.tell(f"containerd@{self.host.name}: kill {program.process_id} -> {said}")


def _programs(random: Random) -> dict[str, Program]:
    """By process id."""
    programs: list[Program] = []
    for base in ("web", "db", "log")[: random.randint(1, CONTAINERS_MAX)]:
        init = Program(base, "", _args(random))
        programs.append(init)
        if init.args[0] != "last":
            programs += [
                Program(base, f"e{number}", _args(random)) for number in range(random.randint(0, EXECS_MAX))
            ]
    return {program.process_id: program for program in programs}


def _args(random: Random) -> tuple[str, ...]:
    match random.choice(("count", "count", "last", "cat")):
        case "count":
            return ("count", random.choice(RATES))
        case "last":
            lines = random.choice((20, 400, 3000))
            return ("last", str(lines), random.choice(RATES), str(random.randrange(1, 100)))
        case _:
            return ("cat",)


def _doings(random: Random, programs: list[Program]) -> list[Doing]:
    return [
        Doing(
            at_s=random.uniform(0, 4),
            program=random.choice([None, *programs]),
            host=random.randrange(2),
            away_s=random.uniform(0, 3),
        )
        for _ in range(random.choice((0, 0, 1, 2)))
    ]
