"""The documented recovery (session/recovery.py, the code that the fleet runs), from every state that was reached.

Nothing goes wrong any more while it runs; what is unread is delivered, or, with the channel cut for ever, is lost.
It must end with one runner, its image the newest, the other VM gone, and both sides cleaned up: wherever there is an
image that somebody may still run. The rows of right-to-run.md, section 9, are the exceptions, and `hopeless` is all
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sandshift.errors import Unavailable
from sandshift.session.recovery import Answer, Ending, Invoke, Look, Pause, Result, View, recover
from sandshift.session.right import (
    AskTimedOut,
    CallMade,
    Channel,
    ChannelLost,
    FrameRead,
    MemoryComplete,
    RightEvent,
    TransferFailed,
    VmDied,
)
from sandshift.session.statement import Cell, Statement
from sandshift.session.states import Call, Side, State
from tests.explore.facts import SIDES, D, Facts, S, Violation
from tests.explore.side import Cost, Faults, Flow, Local, Outcome, Shim, Vm
from tests.explore.world import World

SETTLE_MAX = 64
"""Events in which two undisturbed sides must have nothing left to do."""


@dataclass
class Rescuer:
    """Runs recoveries in one world, and remembers how those it has seen ended."""

    world: World
    cut: bool
    """The channel is cut for ever, with all that is unread."""
    destination_refuses: bool = False
    """The destination's VM refuses every start: the way back from HELD."""
    runs: int = 0
    calls_max: int = 0
    _known: dict[tuple[int, ...], str | None] = field(default_factory=dict)
    _settled: dict[tuple[object, ...], str | None] = field(default_factory=dict)
    _outcomes: dict[tuple[int, int, int, int], Outcome] = field(default_factory=dict)
    _event_ids: dict[RightEvent, int] = field(default_factory=dict)
    events: list[RightEvent] = field(default_factory=list)
    _frame_events: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        handle, check_cells = self.world.rules.faults.handle, self.world.rules.faults.check_cells
        self.vm_died, self.memory_complete, self.transfer_failed, self.channel_lost, self.timed_out = map(
            self.event_id, (VmDied(), MemoryComplete(), TransferFailed(), ChannelLost(), AskTimedOut())
        )
        self._calm = tuple(Shim(side, Faults(Cost(), handle, check_cells=check_cells)) for side in SIDES)
        self._refusing = Shim(Side.DESTINATION, Faults(Cost(0, 0, 1), handle, check_cells=check_cells))

    def failure(self, facts: Facts) -> str | None:
        """What is wrong after the recovery from here; None if nothing is, or if no recovery is promised."""
        key = (
            facts.source, facts.destination, facts.flow, facts.source_fresh, facts.destination_fresh,
            facts.late, self.world.budget(facts).deaths,
            *((0, 0, 1, 1) if self.cut else (facts.to_destination, facts.to_source,
                                             facts.cut_to_destination, facts.cut_to_source)),
        )  # fmt: skip
        self.runs += 1
        if key not in self._known:
            self._known[key] = self._failure(facts)
        return self._known[key]

    def _failure(self, facts: Facts) -> str | None:
        run = Rescue(self, facts)
        if run.promised_nothing():
            return None
        # Most states differ in what is unread; once it has been read, few are left.
        try:
            run.settle()
        except Violation as violation:
            return violation.what
        key = run.key()
        if key not in self._settled:
            self._settled[key] = None if run.promised_nothing() else run.failure()
        return self._settled[key]

    def event_id(self, event: RightEvent) -> int:
        number = self._event_ids.get(event)
        if number is None:
            number = self._event_ids[event] = len(self.events)
            self.events.append(event)
        return number

    def frame_event(self, frame: int) -> int:
        number = self._frame_events.get(frame)
        if number is None:
            number = self._frame_events[frame] = self.event_id(FrameRead(self.world.frames[frame]))
        return number

    def outcome(self, me: int, local: int, flow: int, event: int) -> Outcome:
        key = (me, local, flow, event)
        found = self._outcomes.get(key)
        if found is None:
            shim = self._refusing if me == D and self.destination_refuses else self._calm[me]
            outcomes = shim.outcomes(self.world.locals[me][local], self.events[event], flow)
            refused = [one for one in outcomes if one.cost.refusals]
            found = self._outcomes[key] = (refused or outcomes)[0]
        return found


def hopeless(source: Local, destination: Local, fresh: Sequence[int], *, died: bool) -> bool:
    """No recovery without an operator is promised here: the rows of section 9, or nothing is left to run."""
    s_cell, d_cell = source.disk.cell, destination.disk.cell
    s_dead, d_dead = source.vm == Vm.GONE, destination.vm == Vm.GONE
    if d_cell is Cell.LOST or (d_cell is Cell.STARTING and d_dead):
        return True
    if s_dead and (s_cell is Cell.KEPT or (s_cell is Cell.OPEN and not source.disk.complete)):
        return True
    if d_dead and d_cell is Cell.RUNNING:
        return True
    if _source_usable(source, fresh) or _destination_usable(destination, fresh):
        return False
    # Nobody can run it any more: possible only if a VM has died.
    return died


def _source_usable(source: Local, fresh: Sequence[int]) -> bool:
    return bool(fresh[S]) and source.vm != Vm.GONE and source.disk.cell is not Cell.GONE


def _destination_usable(destination: Local, fresh: Sequence[int]) -> bool:
    held = destination.disk.cell not in (Cell.REFUSED, Cell.LOST)
    return bool(fresh[D]) and destination.vm != Vm.GONE and held


class Rescue:
    """One recovery."""

    def __init__(self, rescuer: Rescuer, facts: Facts) -> None:
        self.rescuer = rescuer
        self.world = rescuer.world
        self.locals = [facts.source, facts.destination]
        self.flow = facts.flow
        self.fresh = [facts.source_fresh, facts.destination_fresh]
        cut = rescuer.cut
        # inbox[S] is what the source has not read.
        self.inbox = [0, 0] if cut else [facts.to_source, facts.to_destination]
        self.cut = [True, True] if cut else [bool(facts.cut_to_source), bool(facts.cut_to_destination)]
        self.replies: list[list[bool | None]] = [[], []]
        self.told: list[tuple[int, int, Outcome]] = []
        """(side, event, what came of it), in order: for a story."""
        self.calls = 0
        self.died = self.world.budget(facts).deaths < self.world.bounds.deaths
        self.late = bool(facts.late)

    def key(self) -> tuple[object, ...]:
        return (*self.locals, self.flow, *self.fresh, *self.inbox, *self.cut, self.died)

    def promised_nothing(self) -> bool:
        source, destination = self._local(S), self._local(D)
        if self.rescuer.destination_refuses and not _source_usable(source, self.fresh):
            return True
        return hopeless(source, destination, self.fresh, died=self.died)

    def failure(self) -> str | None:
        """What is wrong in the end. Settle first."""
        try:
            ending = self._drive()
        except Violation as violation:
            return violation.what
        self.rescuer.calls_max = max(self.rescuer.calls_max, self.calls)
        return self._wrong(ending)

    def _wrong(self, ending: Ending) -> str | None:
        runs = [self._local(me).vm == Vm.RUNNING for me in (S, D)]
        if runs == [False, False]:
            return f"the recovery leaves no runner ({ending.value})"
        if runs == [True, True]:
            return "two runners after the recovery"
        runner = runs.index(True)
        if not self.fresh[runner]:
            return "the recovery ends with an old image running"
        if self._local(1 - runner).vm != Vm.GONE:
            return f"the recovery leaves the {SIDES[1 - runner].word}'s VM behind ({ending.value})"
        for me in (S, D):
            if self._local(me).party.state is not State.IDLE:
                return f"the recovery leaves the {SIDES[me].word}'s session behind ({ending.value})"
        if ending is not (Ending.BACK if runner == S else Ending.FORWARD):
            return f"the recovery says {ending.value!r}, and the guest runs on the {SIDES[runner].word}"
        return None

    def _drive(self) -> Ending:
        procedure = recover()
        answer: Answer = None
        while True:
            try:
                order = procedure.send(answer)
            except StopIteration as done:
                return done.value.ending  # type: ignore[no-any-return]
            answer = self._carry_out(order)

    def _carry_out(self, order: Look | Invoke | Pause) -> Answer:
        match order:
            case Look():
                me = SIDES.index(order.side)
                self._notice(me)
                return self._view(me)
            case Invoke():
                return self._invoke(order)
            case Pause():
                self.settle()
                return None

    def _view(self, me: int) -> View:
        local = self._local(me)
        record = local.party.record
        lost = record.state is State.IDLE and not local.kept
        receipt = None if lost else Statement(record.cell)
        return View(record.cell, record.state, receipt, local.party.vm_alive, record.action)

    def _invoke(self, order: Invoke) -> Result:
        me = SIDES.index(order.side)
        self.calls += 1
        if self._local(me).party.pending is not None:
            self.settle()
            if self._local(me).party.pending is not None:
                self._feed(me, self.rescuer.timed_out)
        self._notice(me)
        self.replies[me].clear()
        if me == S and order.call is Call.STOP:
            self.late = self._local(D).vm == Vm.GONE
        receipt = order.receipt
        assert receipt is None or isinstance(receipt, Statement)
        self._feed(me, self.rescuer.event_id(CallMade(order.call, receipt)))
        self.settle()
        if not self.replies[me]:
            self._feed(me, self.rescuer.timed_out)
        return {True: Result.OK, False: Result.REFUSED, None: Result.UNANSWERED}[self.replies[me][0]]

    # What happens by itself ------------------------------------------------------------------------------------

    def settle(self) -> None:
        for _ in range(SETTLE_MAX):
            if self.flow == Flow.SWITCHING:
                self._vm_settles()
            if not any([self._notice(S), self._notice(D), self._read(S), self._read(D)]):
                return
        raise Violation("the two sides go on for ever without anybody asking for anything")

    def _vm_settles(self) -> None:
        local = self._local(S)
        if not any(self.cut):
            self.flow = Flow.DONE
            return
        self.flow = Flow.RESUMED
        if local.vm != Vm.GONE:
            self.locals[S] = self.world.local_id(S, local._replace(vm=Vm.RUNNING))
            self.fresh[D] = 0

    def _notice(self, me: int) -> bool:
        local = self._local(me)
        party = local.party
        if party.state is State.IDLE:
            return False
        if local.vm == Vm.GONE and party.vm_alive:
            self._feed(me, self.rescuer.vm_died)
            return True
        if me == D and party.cell is Cell.NONE and self.flow != Flow.ON:
            complete = self.flow in (Flow.SWITCHING, Flow.DONE, Flow.RESUMED)
            self._feed(me, self.rescuer.memory_complete if complete else self.rescuer.transfer_failed)
            return True
        if me == S and not party.complete and self.flow == Flow.DONE and party.vm_alive:
            self._feed(me, self.rescuer.memory_complete)
            return True
        if (
            me == S
            and party.cell is Cell.OPEN
            and not party.complete
            and self.flow in (Flow.RESUMED, Flow.BROKEN)
        ):
            self._feed(me, self.rescuer.transfer_failed)
            return True
        if all(self.cut) and not self.inbox[me] and party.channel is not Channel.DOWN:
            self._feed(me, self.rescuer.channel_lost)
            return True
        return False

    def _read(self, me: int) -> bool:
        party = self._local(me).party
        if (
            not self.inbox[me]
            or not party.complete
            or party.channel is Channel.DOWN
            or party.state is State.IDLE
        ):
            return False
        queue = self.world.queues[self.inbox[me]]
        self.inbox[me] = self.world.queue_id(queue[1:])
        self._feed(me, self.rescuer.frame_event(queue[0]))
        return True

    def _feed(self, me: int, event: int) -> None:
        outcome = self.rescuer.outcome(me, self.locals[me], self.flow, event)
        self.told.append((me, event, outcome))
        self.flow = outcome.flow
        self.locals[me] = self.world.local_id(me, outcome.local)
        if outcome.forgets and me == S:
            self.inbox = [self.world.stale(queue) for queue in self.inbox]
        for op in outcome.ops:
            self._touch(me, op.kind, op.what)
        if self._local(me).party.channel is Channel.DOWN:
            self.cut = [True, True]
            self.inbox[me] = 0
        if outcome.reply is not None:
            refusal = outcome.reply.refusal
            unanswered = refusal is not None and issubclass(refusal.kind, Unavailable)
            self.replies[me].append(None if unanswered else refusal is None)

    def _touch(self, me: int, kind: str, what: object) -> None:
        other = 1 - me
        if kind == "send" and not self.cut[other]:
            assert isinstance(what, Statement)
            self.inbox[other] = self.world.append(self.inbox[other], (self.world.frame_id(what),))
        elif kind == "run":
            if self._local(other).vm == Vm.RUNNING:
                raise Violation("two runners during the recovery")
            if not self.fresh[me]:
                raise Violation(f"the recovery starts an old image on the {SIDES[me].word}")
            self.fresh[other] = 0
        elif kind == "destroy":
            last = self.fresh[me] and (self._local(other).vm == Vm.GONE or not self.fresh[other])
            if last and (not self.died or (me == S and self.late)):
                raise Violation("the recovery destroys the last good image")
        elif kind == "cut":
            self.cut = [True, True]
        elif kind == "violation":
            raise Violation(f"during the recovery: {what}")

    def _local(self, me: int):
        return self.world.locals[me][self.locals[me]]
