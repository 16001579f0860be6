"""One case from its beginning to its last check: the move, the fault, the documented recovery, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sandshift.cli.demo.lab import LabHost
from sandshift.errors import SandshiftError
from sandshift.fleet.driver import migrate
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host, delete_shim, start_shim
from sandshift.fleet.launch import stop
from sandshift.fleet.request import Migration
from sandshift.fleet.result import MigrationResult, Update
from sandshift.fleet.resume import migrate_or_resume
from sandshift.fleet.saga import Outcome
from sandshift.fleet.sessions import SideReport, force_resume, forceable, show
from sandshift.fleet.shim_client import connect
from sandshift.fleet.views import EMPTY_STATES
from sandshift.session.states import Side
from tests.faults import client, leftovers, victims, witness
from tests.faults.cases import Case, Promise, Victim, loses_qemu, loses_shim
from tests.faults.scene import ENOUGH, HEARD_S, SWEEPS, Guest, Scene
from tests.faults.steps import Plan

CASE_S: Final = 240.0
"""How long one case may take on a machine under load; a quiet one needs 6 to 15 s."""
SPRUNG_S: Final = 10.0
"""How long after the coordinator's end the step may still come."""
TRIES_MAX: Final = 3
"""So often a case is begun whose move ends before the step."""
RECOVERIES_MAX: Final = 3
"""So often the coordinator is run again before it counts as failed."""
QUIET_S: Final = 0.25
"""A guest that says a number every 5 ms and is not heard for so long does not run."""
RUNS: Final = frozenset({Outcome.MOVED, Outcome.UNDONE, Outcome.REFUSED})
PROMISES: Final = {
    **dict.fromkeys(RUNS, Promise.RUNS),
    Outcome.CRASHED: Promise.LOST,
    Outcome.UNDECIDED: Promise.OPERATOR,
}
OPERATORS_ROWS: Final = {
    ("RELEASED", "LOST"): Side.SOURCE,
    ("KEPT", "READY"): Side.DESTINATION,
}
"""Cells of source and destination where a person must decide -> the side on which RESUME can be forced.
Source: docs/explanation/right-to-run.md, "What needs an operator", as far as a host that comes back can be in it."""


@dataclass(slots=True)
class Played:
    """What came of a case."""

    case: Case
    came: Promise | None = None
    ended: str = ""
    """The coordinator's word: "moved", "undone" ..."""
    clashes: list[str] = field(default_factory=list)
    bad_pages: int = 0
    leftovers: list[str] = field(default_factory=list)
    lost: bool = False
    recovery_ms: float | None = None
    """From the fault until the guest is heard and the session is over everywhere."""
    silent_ms: float | None = None
    """The guest's longest silence across fault and recovery."""
    moved_again: bool = False
    problems: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.clashes or self.bad_pages or self.leftovers or self.lost or self.problems)


class NotReached(Exception):
    """The move did not come to the step: it ended before, by itself. No fault was made, and nothing is known."""


async def play(scene: Scene, case: Case) -> Played:
    """Play one case; never raises for what goes wrong in it.

    A move that a busy machine ends before it comes to the step is none: the case is played again.
    """
    for _ in range(TRIES_MAX):
        played = Played(case)
        began_s = time.monotonic()
        reached = await _play(scene, played)
        played.took_s = time.monotonic() - began_s
        if reached:
            break
    return played


async def _play(scene: Scene, played: Played) -> bool:
    """Whether it came to the step."""
    run: _Run | None = None
    try:
        async with asyncio.timeout(CASE_S):
            run = _Run(scene, played.case, await scene.running_guest(), played)
            await run.play()
    except NotReached as error:
        played.problems.append(str(error))
        return False
    except (Exception, TimeoutError) as error:
        played.problems.append(f"{type(error).__name__}: {error}")
    finally:
        if run is not None:
            await run.put_right()
        if not played.good or played.came is Promise.LOST:
            await scene.remove_everything()
    return True


class _Run:
    def __init__(self, scene: Scene, case: Case, guest: Guest, played: Played) -> None:
        self.scene = scene
        self.case = case
        self.guest = guest
        self.played = played
        self.here, self.there = guest.on, scene.other(guest.on)
        self.session = f"fault-{secrets.token_hex(4)}"
        self.at_ns = 0
        self._coordinator: asyncio.subprocess.Process | None = None
        self._deleting: asyncio.Task[None] | None = None
        self._silent = False

    def host(self, side: Side) -> LabHost:
        return self.here if side is Side.SOURCE else self.there

    def migration(self) -> Migration:
        return Migration(load(self.here), load(self.there), self.guest.sandbox_id, self.session)

    async def play(self) -> None:
        step = self.case.step
        self.scene.traps.arm(self.host(step.side).folder, step.point, self._fault, count=step.count)
        first = await self._drive()
        try:
            async with asyncio.timeout(SPRUNG_S):
                await self.scene.traps.sprung.wait()
        except TimeoutError:
            why = f"{first.outcome.value}, {first.failed_call}: {first.reason}" if first else "no result"
            raise NotReached(f"no shim came to the step {step.point!r}; the move: {why}") from None
        if self.scene.traps.error is not None:
            raise self.scene.traps.error
        outcome = await self._recover(first)
        self.played.came, self.played.ended = PROMISES[outcome], outcome.value
        if outcome in RUNS and Promise.LOST in self.case.promises and await self._has_crashed(outcome):
            self.played.came = Promise.LOST
        if self.played.came not in self.case.promises:
            self.played.lost = self.played.came is Promise.LOST
            wanted = " or ".join(sorted(each.value for each in self.case.promises))
            self.played.problems.append(f"came to {self.played.came.value!r}, not to {wanted!r}")
            return
        match self.played.came:
            case Promise.RUNS:
                await self._check_runs(self.there if outcome is Outcome.MOVED else self.here)
            case Promise.OPERATOR:
                await self._check_operator()
            case Promise.LOST:
                await self._check_lost()

    async def _has_crashed(self, outcome: Outcome) -> bool:
        """The coordinator's word is right and the guest has crashed all the same, where it ran: the sandbox says so."""
        runner = self.there if outcome is Outcome.MOVED else self.here
        return (await self._show(runner)).vm_state in EMPTY_STATES

    # The move and the fault

    async def _drive(self) -> MigrationResult | None:
        """Up to the fault and as far beyond as the driver comes. None: it knows no result."""
        if self.case.victim is Victim.COORDINATOR:
            await self._drive_to_its_death()
            return None
        try:
            match self.case.step.plan:
                case Plan.MOVE:
                    return await migrate(self.migration())
                case Plan.TURN_BACK:
                    return await self._turn_back()
                case Plan.STOP_FIRST:
                    await client.stop_first(self.migration())
        except SandshiftError:
            pass
        return None

    async def _drive_to_its_death(self) -> None:
        self._coordinator = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.faults.coordinator",
            str(self.here.config_path), str(self.there.config_path), self.guest.sandbox_id, self.session,
            str(self.scene.program), cwd=Path(__file__).parents[2],
        )  # fmt: skip
        await self._coordinator.wait()

    async def _turn_back(self) -> MigrationResult:
        """Interrupted as by Ctrl-C while memory flows."""
        task: asyncio.Task[MigrationResult] | None = None

        def interrupt(update: Update) -> None:
            if update.phase == "SETUP_DONE" and task is not None:
                task.cancel()

        task = asyncio.ensure_future(migrate(self.migration(), on_update=interrupt))
        return await task

    async def _fault(self) -> None:
        """While a shim stands still at the step."""
        self.at_ns = time.time_ns()
        victim = self.case.victim
        if victim is Victim.COORDINATOR:
            assert self._coordinator is not None
            self._coordinator.kill()
            await self._coordinator.wait()
        elif victim is Victim.SILENCE:
            self._silent = True
            await victims.silence(self.scene.lab)
        elif victim is Victim.CUT:
            pids = [pid for record in self._records(self.here) if (pid := victims.pid_in(record)) is not None]
            if not victims.cut(pids, {self.there.address}):
                raise RuntimeError("there was no channel to cut")
        else:
            await self._kill()

    async def _kill(self) -> None:
        pids = []
        for side, record in (
            (loses_qemu(self.case.victim), victims.vm_pid_file),
            (loses_shim(self.case.victim), victims.shim_pid_file),
        ):
            if side is not None:
                host = load(self.host(side))
                pid = victims.pid_in(record(host, NAMESPACE_DEFAULT, self.guest.sandbox_id))
                if pid is None:
                    raise RuntimeError(f"the {self.case.victim.value} was not there to be killed")
                pids.append(pid)
        await asyncio.gather(*(victims.kill(pid) for pid in pids))
        if (side := loses_shim(self.case.victim)) is not None and self.case.by_delete:
            self._deleting = asyncio.create_task(self._as_containerd_does(self.host(side)))

    async def _as_containerd_does(self, on: LabHost) -> None:
        """`delete`, at once, where a session is open; without one that would end the sandbox, as containerd wants it."""
        host = load(on)
        if (host.config.sandbox_state_dir(NAMESPACE_DEFAULT, self.guest.sandbox_id) / "session").exists():
            await delete_shim(host, NAMESPACE_DEFAULT, self.guest.sandbox_id)

    def _records(self, on: LabHost) -> list[Path]:
        host, sandbox_id = load(on), self.guest.sandbox_id
        return [
            victims.vm_pid_file(host, NAMESPACE_DEFAULT, sandbox_id),
            victims.shim_pid_file(host, NAMESPACE_DEFAULT, sandbox_id),
        ]

    # The documented recovery

    async def _recover(self, first: MigrationResult | None) -> Outcome:
        """`sandshift migrate --session ID` until it has an end and the side that has nothing is empty."""
        if self._deleting is not None:
            await self._deleting
        result, why = first, ""
        for again in range(RECOVERIES_MAX + 1):
            if result is not None:
                undecided = result.outcome is Outcome.UNDECIDED
                expected = self.case.promises == {Promise.OPERATOR} or (
                    again and Promise.OPERATOR in self.case.promises
                )
                if (not undecided or expected) and not await self._unfinished(result.outcome):
                    return result.outcome
            if again == RECOVERIES_MAX:
                break
            try:
                result = await migrate_or_resume(self.migration())
                why = f"{result.outcome.value}: {result.reason} {result.warnings}"
            except SandshiftError as error:
                result, why = None, f"{type(error).__name__}: {error.message}"
        if result is not None:
            self.played.problems.append(why)
            return result.outcome
        raise RuntimeError(f"the coordinator, run again, came to no end: {why}")

    async def _unfinished(self, outcome: Outcome) -> bool:
        """The guest has its place, and something is left to do: the coordinator warned of it ("repeat with --session")."""
        if outcome not in RUNS:
            return False
        runner, loser = (self.there, self.here) if outcome is Outcome.MOVED else (self.here, self.there)
        return bool(await self._left(loser) or await asyncio.to_thread(leftovers.beside_the_guest, runner))

    async def _left(self, on: LabHost) -> list[str]:
        return await asyncio.to_thread(leftovers.left_on, on)

    # What must be true now

    async def _check_runs(self, runner: LabHost) -> None:
        host = load(runner)
        await start_shim(
            host, NAMESPACE_DEFAULT, self.guest.sandbox_id
        )  # `session resume`: one that lives stays
        over_ns = time.time_ns()
        if not await self._heard(runner, since_ns=over_ns, sweeps=SWEEPS):
            self.played.lost = True
            return
        since = [
            each.at_ns
            for each in self.scene.eyes.seen
            if each.host == runner.names.letter and each.at_ns > self.at_ns
        ]
        self.played.recovery_ms = (max(over_ns, since[0]) - self.at_ns) / 1e6
        self.played.silent_ms = witness.longest_silence_ns(self.scene.eyes.seen, self.at_ns) / 1e6
        await self._end_silence()
        await self._count_leftovers(loser=self.scene.other(runner), runner=runner)
        await self._move_on(runner)
        self._count_words(self.scene.eyes.seen)

    async def _heard(self, on: LabHost, *, since_ns: int, sweeps: int = 0) -> bool:
        try:
            async with asyncio.timeout(HEARD_S):
                return await self.scene.eyes.wait_for(
                    ENOUGH, host=on.names.letter, since_ns=since_ns, sweeps=sweeps
                )
        except TimeoutError:
            self.played.problems.append(f"the guest was not heard on host {on.names.letter}")
            return False

    async def _count_leftovers(self, *, loser: LabHost, runner: LabHost) -> None:
        self.played.leftovers += await self._left(loser)
        self.played.leftovers += await asyncio.to_thread(leftovers.beside_the_guest, runner)

    async def _move_on(self, runner: LabHost) -> None:
        """The sandbox can migrate again at once."""
        target = self.scene.other(runner)
        result = await migrate(
            Migration(load(runner), load(target), self.guest.sandbox_id, f"{self.session}-on")
        )
        if not result.moved:
            self.played.problems.append(
                f"could not move again: {result.outcome.value}, {result.failed_call}: {result.reason}"
            )
            return
        self.played.moved_again = await self._heard(target, since_ns=time.time_ns(), sweeps=SWEEPS)
        self.guest.on = target
        await self._count_leftovers(loser=runner, runner=target)

    def _count_words(self, *stories: list[witness.Sighting]) -> None:
        for story in stories:
            self.played.clashes += [str(clash) for clash in witness.clashes(story)]
            self.played.bad_pages = max([self.played.bad_pages, *(each.bad_pages for each in story)])
        if drops := self.scene.eyes.drops():
            self.played.problems.append(f"the witness missed {drops} frames")

    async def _check_lost(self) -> None:
        """Nothing runs, the sandbox says that it ended, and it can be removed whole."""
        await self._end_silence()
        await self._nobody_runs()
        for on in (self.here, self.there):
            host = load(on)
            if host.has_shim(NAMESPACE_DEFAULT, self.guest.sandbox_id):
                await stop(host, NAMESPACE_DEFAULT, self.guest.sandbox_id)
        self.played.leftovers += [*await self._left(self.here), *await self._left(self.there)]
        self._count_words(self.scene.eyes.seen)

    async def _nobody_runs(self) -> None:
        quiet_since_ns = time.time_ns()
        await asyncio.sleep(QUIET_S)
        if heard := [each for each in self.scene.eyes.seen if each.at_ns > quiet_since_ns]:
            self.played.problems.append(f"the guest still runs on host {heard[-1].host}")

    # Where a person must decide

    async def _check_operator(self) -> None:
        """The guest is kept, in a pair of cells that the documents name; and what they offer brings it back."""
        await self._end_silence()
        await self._nobody_runs()
        source, destination = [await self._show(on) for on in (self.here, self.there)]
        side = OPERATORS_ROWS.get((source.cell, destination.cell))
        if side is None:
            self.played.problems.append(
                f"an operator is asked in {source.cell} and {destination.cell}, which the documents do not name"
            )
            return
        kept = (source if side is Side.SOURCE else destination).vm_state
        if kept not in ("paused", "postmigrate"):
            self.played.problems.append(f"the guest is not kept paused: its VM is {kept}")
            return
        before = self.scene.eyes.seen
        forced_ns = time.time_ns()
        await self._force(self.host(side))
        if not await self._heard(self.host(side), since_ns=forced_ns, sweeps=SWEEPS):
            self.played.lost = True
            return
        await self._clean_up_after_force(side)
        await self._count_leftovers(loser=self.host(side.peer), runner=self.host(side))
        self.scene.eyes.forget()
        await self._move_on(self.host(side))
        after = [each for each in self.scene.eyes.seen if each.at_ns > forced_ns]
        self._count_words(before, after)  # forced, the guest may go back in time: told in the documents

    async def _show(self, on: LabHost) -> SideReport:
        host = load(on)
        await start_shim(host, NAMESPACE_DEFAULT, self.guest.sandbox_id)
        return await show(host, NAMESPACE_DEFAULT, self.guest.sandbox_id, self.session)

    async def _force(self, on: LabHost) -> None:
        """`sandshift session force-resume`."""
        async with contextlib.aclosing(
            await connect(load(on), NAMESPACE_DEFAULT, self.guest.sandbox_id)
        ) as shim:
            await force_resume(shim, self.session, await forceable(shim, self.session))

    async def _clean_up_after_force(self, runner: Side) -> None:
        """The coordinator again, which finds a decision now; then the sandbox that ended is removed."""
        result = await migrate_or_resume(self.migration())
        wanted = Outcome.MOVED if runner is Side.DESTINATION else Outcome.UNDONE
        if result.outcome is not wanted:
            self.played.problems.append(
                f"after force-resume the session ends {result.outcome.value}: {result.reason} {result.warnings}"
            )
        other = load(self.host(runner.peer))
        if other.has_shim(NAMESPACE_DEFAULT, self.guest.sandbox_id):
            await stop(other, NAMESPACE_DEFAULT, self.guest.sandbox_id)

    # Afterwards

    async def _end_silence(self) -> None:
        if self._silent:
            self._silent = False
            await victims.end_silence(self.scene.lab)

    async def put_right(self) -> None:
        self.scene.traps.disarm()
        await self._end_silence()
        if self._coordinator is not None and self._coordinator.returncode is None:
            self._coordinator.kill()
            await self._coordinator.wait()
        if self._deleting is not None:
            await asyncio.gather(self._deleting, return_exceptions=True)


def load(on: LabHost) -> Host:
    return Host.load(on.config_path)
