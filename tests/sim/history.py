"""One history: a sandbox is moved while things go wrong, recovers by the documented rules, and is moved again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import ttrpc
from sandshift.fleet.request import Migration
from sandshift.fleet.result import MigrationResult
from sandshift.fleet.resume import migrate_or_resume
from sandshift.fleet.saga import Outcome
from sandshift.session.right import handle
from sandshift.wire.migration import messages_pb2 as m
from tests.shim.house import NAMESPACE, SANDBOX
from tests.sim.faults import Fault, Kind, choose
from tests.sim.hosts import SimHost
from tests.sim.loop import EPOCH_S, SimLoop, Stuck, owned_by, quietly
from tests.sim.pod_end import leave, look_back, settle
from tests.sim.pods import Pods, has_pod
from tests.sim.stage import Handle, Stage, clear

SESSION = "session-1"
NEXT_SESSION = "session-2"
RATES = (0.0, 500.0, 20_000.0, 400_000.0)
"""Pages per second that the guest writes; the channel carries 262,144."""
COORDINATORS_LAST = 3
"""How often the last, good coordinator is run."""
HISTORY_S_MAX = 3600.0
STORM_CALLS = 6
GUEST_REASONS = {Kind.REBOOT: "guest-reset", Kind.POWER_OFF: "guest-shutdown"}
_ENDS_ON = {"source": Outcome.UNDONE, "destination": Outcome.MOVED}


@dataclass
class History:
    """What came of one seed."""

    seed: int
    faults: list[Fault] = field(default_factory=list)
    story: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    outcome: str = ""
    steps: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: ./run sim --seed {self.seed}",
            *(f"  {fault}" for fault in self.faults),
            *self.story,
        ]
        return "\n".join(
            [*lines, *(f"  VIOLATION {violation}" for violation in self.violations), f"  {self.outcome}"]
        )


def run(seed: int, *, protocol: Handle = handle) -> History:
    """Run the history of `seed`. The same seed gives the same story.

    Args:
        seed: chooses all that there is to choose.
        protocol: what decides instead of `session.right.handle`: with a guard dropped, to see that it is noticed.
    """
    gc_was_on = gc.isenabled()
    _keep_what_is_loaded()
    gc.disable()  # what it collects and when would be chance
    try:
        return _played(seed, protocol)
    finally:
        with quietly():
            gc.collect()  # what only this history held
        if gc_was_on:
            gc.enable()


@functools.cache
def _keep_what_is_loaded() -> None:
    """What was there before the first history is not looked through after every one."""
    gc.collect()
    gc.freeze()


def _played(seed: int, protocol: Handle) -> History:
    random = Random(seed)
    history = History(seed, choose(random, pod=has_pod(seed)))
    folder = Path(tempfile.mkdtemp(prefix="sim-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    loop = SimLoop()
    loop.set_exception_handler(lambda _loop, _context: None)
    stage = Stage(folder, random, loop, protocol)
    pods = Pods(stage, seed) if has_pod(seed) else None
    try:
        if pods is not None:
            stage.replacements_more = pods.replacements()
        with stage.set_up():
            try:
                loop.run_until_complete(asyncio.wait_for(_Play(stage, history, pods).all(), HISTORY_S_MAX))
            except Stuck as error:
                history.violations.append(f"stuck: {error}")
            except TimeoutError:
                history.violations.append(f"not over after {HISTORY_S_MAX:g} s")
            finally:
                history.steps, history.seconds = loop.sim.steps, loop.time() - EPOCH_S
                loop.sim.steps = 0  # a livelock has come to its end
                history.story = list(stage.story)
                history.violations += stage.wrong
                if pods is not None:
                    history.violations += pods.violations
                    stage.at_end = pods.end
                asyncio.set_event_loop(loop)
                loop.run_until_complete(stage.end())
                loop.end()
                asyncio.set_event_loop(None)
    finally:
        clear(folder)
    return history


class _Play:
    def __init__(self, stage: Stage, history: History, pods: Pods | None) -> None:
        self._stage = stage
        self._pods = pods
        self._history = history
        self._random = stage.random
        self._waiting = [fault for fault in history.faults if fault.at_call]
        self._due_at: list[tuple[int, Fault]] = []
        self._coordinators: dict[str, asyncio.Task[Any]] = {}
        self._lost_on: set[str] = set()
        self._lost_for = ""
        """Why the guest may be gone: a VM was killed that had the right to run, or may have had it."""
        self._began_s = 0.0
        self._receipts: list[bytes] = []
        self._strangers: set[asyncio.Task[Any]] = set()

    async def all(self) -> None:
        stage = self._stage
        await self._boot()
        self._began_s = stage.loop.time()
        stage.loop.sim.before_step = self._due
        stage.on_call = self._called
        for fault in self._history.faults:
            if not fault.at_step:
                stage.loop.call_at(self._began_s + fault.at_s, self._strike, fault)
            elif not fault.at_call:
                self._due_at.append((stage.loop.sim.steps + fault.at_step, fault))
        self._start_coordinator()
        await self._until_quiet()
        stage.loop.sim.before_step = lambda: None
        stage.on_call = lambda _step: None
        if not stage.witness.violations:
            await self._recover()
        if self._pods is not None:
            look_back(self._pods)

    async def _boot(self) -> None:
        stage = self._stage
        await stage.source.start_shim()
        client = await stage.source.client()
        await client.start_sandbox()
        await client.connection.close()
        assert stage.source.vm is not None
        stage.source.vm.guest.pages_per_s = self._random.choice(RATES)
        if self._pods is not None:
            await self._pods.boot()

    # Faults

    def _due(self) -> None:
        """Before every turn of the loop."""
        now = self._stage.loop.sim.steps
        for at, fault in [due for due in self._due_at if due[0] <= now]:
            self._due_at.remove((at, fault))
            self._strike(fault)

    def _called(self, step: str) -> None:
        """Somebody makes a call: the faults that wait for it are due soon."""
        for fault in [fault for fault in self._waiting if fault.at_call == step]:
            self._waiting.remove(fault)
            self._due_at.append((self._stage.loop.sim.steps + fault.at_step, fault))

    def _strike(self, fault: Fault) -> None:
        stage = self._stage
        with owned_by("world"):
            match fault.kind:
                case Kind.SOURCE_SHIM:
                    self._kill_shims(fault, stage.source)
                case Kind.DESTINATION_SHIM:
                    self._kill_shims(fault, stage.destination)
                case Kind.BOTH_SHIMS:
                    self._kill_shims(fault, *stage.hosts)
                case Kind.SOURCE_VM:
                    self._kill_vm(stage.source)
                case Kind.DESTINATION_VM:
                    self._kill_vm(stage.destination)
                case Kind.SOURCE_BOTH:
                    self._kill_vm(stage.source)
                    self._kill_shims(fault, stage.source)
                case Kind.DESTINATION_BOTH:
                    self._kill_vm(stage.destination)
                    self._kill_shims(fault, stage.destination)
                case Kind.CUT | Kind.SILENT_THERE | Kind.SILENT_BACK | Kind.STALL:
                    self._harm_channel(fault)
                case Kind.REBOOT | Kind.POWER_OFF | Kind.PANIC:
                    self._end_guest(fault)
                case Kind.VM_STALL | Kind.REFUSE_START:
                    self._harm_vm(fault)
                case Kind.REFUSE_SHIM:
                    stage.tell(f"FAULT {fault.kind.value}")
                    stage.hosts[fault.number % 2].refusals += 1 + fault.number % 3
                case Kind.COORDINATOR | Kind.SECOND_COORDINATOR:
                    self._harm_coordinator(fault)
                case Kind.CANCEL | Kind.FINALIZE | Kind.STORM:
                    task = asyncio.get_running_loop().create_task(self._stranger(fault))
                    self._strangers.add(task)

    def _kill_shims(self, fault: Fault, *hosts: SimHost) -> None:
        for host in hosts:
            if host.owner:
                host.kill_shim()
                if fault.after_s >= 0:
                    self._stage.loop.call_later(fault.after_s, self._start_again, host)

    def _start_again(self, host: SimHost) -> None:
        if host.places.run_dir.exists():
            host._ensure_shim()

    def _kill_vm(self, host: SimHost) -> None:
        vm = host.vm
        if vm is None:
            return
        elsewhere = [where for process, where in self._stage.witness.running.items() if process is not vm]
        if not elsewhere:
            self._lost_on.add(host.name)
            self._lost_for = self._lost_for or f"the VM on {host.name} was killed when no other ran the guest"
        host.kill_vm()

    def _end_guest(self, fault: Fault) -> None:
        """The guest itself does it, so it must run."""
        for process, where in list(self._stage.witness.running.items()):
            self._stage.tell(f"FAULT {fault.kind.value}, on {where}")
            self._lost_on.add(where)
            self._lost_for = self._lost_for or f"{fault.kind.value} on {where}"
            if fault.kind is Kind.PANIC:
                process.panic()
            else:
                process.power_off(reason=GUEST_REASONS[fault.kind])

    def _harm_channel(self, fault: Fault) -> None:
        wire = self._stage.wires[-1] if self._stage.wires else None
        if wire is None or wire.cut_off:
            return
        self._stage.tell(f"FAULT {fault.kind.value}")
        match fault.kind:
            case Kind.CUT:
                wire.cut()
            case Kind.SILENT_THERE | Kind.SILENT_BACK:
                wire.silence(to_destination=fault.kind is Kind.SILENT_THERE)
            case _:
                wire.stall(self._stage.loop.time() + fault.after_s)

    def _harm_vm(self, fault: Fault) -> None:
        stage = self._stage
        vm = stage.destination.vm if fault.kind is Kind.REFUSE_START else stage.source.vm
        if vm is None:
            return
        stage.tell(f"FAULT {fault.kind.value}")
        if fault.kind is Kind.VM_STALL:
            vm.faults.stall = True
            stage.loop.call_later(max(fault.after_s, 0.01), setattr, vm.faults, "stall", False)
        else:
            vm.faults.refuse_start = "the simulation refuses"
            if fault.after_s >= 0:
                stage.loop.call_later(fault.after_s, setattr, vm.faults, "refuse_start", "")

    def _harm_coordinator(self, fault: Fault) -> None:
        living = [
            owner
            for owner, task in self._coordinators.items()
            if not task.done() and not self._stage.loop.is_dead(owner)
        ]
        if fault.kind is Kind.COORDINATOR and living:
            self._stage.kill_coordinator(living[fault.number % len(living)])
        if fault.kind is Kind.SECOND_COORDINATOR or fault.after_s >= 0:
            for _ in range(1 + (fault.number % 3 == 0)):
                self._stage.loop.call_later(max(fault.after_s, 0.0), self._start_coordinator)

    # Callers

    def _start_coordinator(self) -> asyncio.Task[MigrationResult | None]:
        owner = f"coordinator-{len(self._coordinators) + 1}"
        with owned_by(owner):
            task = asyncio.get_running_loop().create_task(self._coordinate(owner), name=owner)
        self._coordinators[owner] = task
        return task

    async def _coordinate(
        self, owner: str, session_id: str = SESSION, *, back: bool = False
    ) -> MigrationResult | None:
        stage = self._stage
        source, destination = stage.source.fleet, stage.destination.fleet
        if back:
            source, destination = destination, source
        ownership = self._pods.ownership if self._pods is not None else {}
        migration = Migration(source, destination, SANDBOX, session_id, NAMESPACE, **ownership)
        stage.tell(f"{owner} begins with {session_id}")
        try:
            result = await migrate_or_resume(migration)
        except Exception as error:
            stage.tell(f"{owner} gives up: {error!r}")
            return None
        why = f", {result.reason!r}" if result.reason else ""
        stage.tell(f"{owner}: {result.outcome.name}{why} {' '.join(result.warnings)}")
        return result

    async def _stranger(self, fault: Fault) -> None:
        calls = STORM_CALLS if fault.kind is Kind.STORM else 1
        for number in range(calls):
            await self._strange_call(fault, (fault.number >> number) & 0xFF)
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def _strange_call(self, fault: Fault, number: int) -> None:
        host = self._stage.hosts[number % 2]
        try:
            client = await host.client()
        except OSError:
            return
        what = "Cancel"
        try:
            if fault.kind is Kind.CANCEL:
                await client.migration.cancel(m.CancelRequest(session_id=SESSION), timeout_s=20)
            else:
                action = m.FINALIZE_ACTION_RESUME if number & 2 else m.FINALIZE_ACTION_STOP
                receipt = await self._some_receipt(number)
                what = f"{m.FinalizeAction.Name(action)}{' with a receipt' if receipt else ''}"
                self._stage.tell(f"STRANGER {host.name}: {what}")
                await client.finalize(SESSION, action, receipt)
        except (ttrpc.StatusError, OSError) as error:
            self._stage.tell(f"STRANGER {host.name}: {what} -> {str(error)[:120]}")
        else:
            self._stage.tell(f"STRANGER {host.name}: {what} -> OK")
        finally:
            await client.connection.close()

    async def _some_receipt(self, number: int) -> bytes:
        """None, a fresh one of either side, or an old one."""
        for host in self._stage.hosts:
            with contextlib.suppress(OSError, ttrpc.StatusError):
                client = await host.client()
                with contextlib.suppress(ttrpc.StatusError):
                    if receipt := (await client.status()).session.receipt:
                        self._receipts.append(receipt)
                await client.connection.close()
        if not self._receipts or not number & 4:
            return b""
        return self._receipts[self._random.randrange(len(self._receipts))]

    async def _until_quiet(self) -> None:
        """Until every fault has come and nobody who lives is at work."""
        while True:
            working = [
                task
                for owner, task in self._coordinators.items()
                if not task.done() and not self._stage.loop.is_dead(owner)
            ]
            working += [task for task in self._strangers if not task.done()]
            if working:
                await asyncio.wait(working, timeout=1.0)
            elif self._stage.loop.time() < self._began_s + 2.0 + 3.0:
                await asyncio.sleep(0.5)
            else:
                break

    # The end

    async def _recover(self) -> None:
        stage = self._stage
        for host in stage.hosts:
            host.refusals = 0
            if host.vm is not None:
                host.vm.faults.refuse_start, host.vm.faults.stall = "", False
        result = None
        for _ in range(COORDINATORS_LAST):
            stage.tell("the last, good coordinator")
            result = await self._start_coordinator()
            if result is not None and result.outcome is not Outcome.UNDECIDED:
                break
        self._history.outcome = result.outcome.name if result else "NOTHING"
        await self._check(result)

    async def _check(self, result: MigrationResult | None) -> None:
        stage, wrong = self._stage, self._history.violations
        runners = sorted(stage.witness.running.values())
        if len(runners) == 1:
            await self._clear_away(runners[0])
            self._check_runner(result, runners[0])
            if not wrong:
                await self._go_on(runners[0])
            return
        if not self._lost_for:
            wrong.append(
                f"{len(runners)} runners at the end and no VM was killed that could explain it: {result}"
            )
        elif result is not None and result.outcome not in {
            Outcome.CRASHED,
            Outcome.UNDECIDED,
            Outcome.REFUSED,
            *(_ENDS_ON[host] for host in self._lost_on),
        }:
            wrong.append(f"said {result.outcome.name}, but nobody runs the guest ({self._lost_for})")

    async def _clear_away(self, runner: str) -> None:
        """What a coordinator does not end where containerd owns the pods."""
        if self._pods is not None and self._pods.owned:
            await self._pods.caller_of("source" if runner == "destination" else "destination").clear_away()

    async def _go_on(self, runner: str) -> None:
        """What users have works on, the sandbox moves again, and works on there."""
        if self._pods is not None:
            await settle(self._pods, runner)
        await self._move_again(runner)
        if self._pods is not None and not self._history.violations:
            now = sorted(self._stage.witness.running.values())
            await settle(self._pods, now[0])
            await self._clear_away(now[0])
            await leave(self._pods, now[0])

    def _check_runner(self, result: MigrationResult | None, runner: str) -> None:
        stage, wrong = self._stage, self._history.violations
        winner, loser = stage.hosts if runner == "source" else stage.hosts[::-1]
        expected = Outcome.UNDONE if winner is stage.source else Outcome.MOVED
        outcome = result.outcome if result else None
        if outcome is not expected:
            wrong.append(
                f"{runner} runs the guest, but the coordinator said {outcome and outcome.name}: {result and result.reason!r}"
            )
        if loser.leftovers:
            wrong.append(f"left on {loser.name}: {', '.join(loser.leftovers)}")
        if winner.places.unfinished_session():
            wrong.append(f"the session is still open on {winner.name}")

    async def _move_again(self, runner: str) -> None:
        await self._until_quiet()  # A fault that came only now may have called further coordinators.
        back = runner == "destination"
        if self._pods is not None and self._pods.owned:
            await self._pods.caller_of("source" if back else "destination").await_sandbox()
        with owned_by("coordinator-again"):
            task = asyncio.get_running_loop().create_task(
                self._coordinate("coordinator-again", NEXT_SESSION, back=back)
            )
        result = await task
        if result is None or not result.moved:
            self._history.violations.append(
                f"cannot move again from {runner}: {result.outcome.name if result else 'error'} {result.reason if result else ''}"
            )
