"""Both shims, the channel between them, and everything that can happen next.

A state is one integer: the numbers of the two `Local`s, what is unread in each direction, and the facts that no shim
knows (where the memory is, whose image is the newest, which receipts exist). `World.successors` gives every state that
one event leads to; what the two sides do alone is computed once for each of their `Local`s and looked up afterwards.

Checked at every step:

* never two runners;
* no guest is started from an image that is older than the guest;
* no running guest is killed;
* without a VM's death, the last good image is never destroyed, and never given up;
* with one, the source does not give its image up, if it is the last good one, in a STOP that came after the death;
* virtual CPUs start, and a VM is destroyed, only in the cells that allow it, as they are on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
from sandshift.session.right_destination import LOOKED_AT as DESTINATION_LOOKS_AT
from sandshift.session.right_source import LOOKED_AT as SOURCE_LOOKS_AT
from sandshift.session.statement import Ask, Cell, Statement
from sandshift.session.states import Call, Side, State
from tests.explore.facts import (
    BUDGET_MAX,
    ID_MAX,
    MASK_BITS,
    QUEUE_MAX,
    SIDES,
    Bounds,
    D,
    Facts,
    S,
    Violation,
    pack,
    unpack,
)
from tests.explore.side import Cost, Faults, Flow, Local, Outcome, Shim, Vm, first_local, stale_frame

UNREAD_MAX = 2
"""Frames per direction that wait to be read; equal neighbours count as one, a third is lost."""

CALLS = (Call.RESUME, Call.STOP, Call.CANCEL, Call.CLEANUP)


class Move(NamedTuple):
    """What one side can do next, whatever the other side is."""

    label: int
    local: int
    flow: int
    pops: bool
    sends: tuple[int, ...]
    forgets: bool
    ops: tuple[str, ...]
    wrote: int
    """Receipts that exist from now on."""
    gave_up: bool
    """The source wrote GONE with its VM alive."""
    stop_called: bool
    budget: int
    violations: tuple[str, ...]


@dataclass
class Rules:
    """What the search is to believe: the protocol as it is, unless a guard is dropped."""

    faults: Faults
    extra_receipts: frozenset[tuple[Call, Cell, Cell]] = frozenset()
    """Receipts that a weakened protocol looks at, beyond those of section 6."""
    foreign_receipts: bool = False
    """Receipts of another session are believed."""
    deaths_are_noticed: bool = True
    """Every handler looks whether its VM lives before it answers or decides."""


@dataclass
class World:
    bounds: Bounds
    rules: Rules
    unread_max: int = UNREAD_MAX
    channel_repeats: bool = False
    """A frame may come again after it was read."""
    locals: tuple[list[Local], list[Local]] = field(default_factory=lambda: ([], []))
    labels: list[str] = field(default_factory=list)
    queues: list[tuple[int, ...]] = field(default_factory=list)
    frames: list[Statement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shims = tuple(Shim(side, self.rules.faults) for side in SIDES)
        self._local_ids: tuple[dict[Local, int], dict[Local, int]] = ({}, {})
        self._label_ids: dict[str, int] = {}
        self._queue_ids: dict[tuple[int, ...], int] = {}
        self._frame_ids: dict[Statement, int] = {}
        self._budgets: list[Cost] = []
        self._budget_ids: dict[Cost, int] = {}
        self._moves: dict[tuple[int, int, int, int, int, bool, int], list[Move]] = {}
        self._appended: dict[tuple[int, tuple[int, ...]], int] = {}
        self._staled: dict[int, int] = {}
        self.vm: tuple[list[int], list[int]] = ([], [])
        self.down: tuple[list[bool], list[bool]] = ([], [])
        self.waits: list[bool] = []
        looked_at = SOURCE_LOOKS_AT | DESTINATION_LOOKS_AT | self.rules.extra_receipts
        self.looked_at = looked_at
        self._receipt_bits = {
            cell: 1 << position
            for position, cell in enumerate(sorted({entry[2] for entry in looked_at}, key=lambda c: c.value))
        }
        assert len(self._receipt_bits) <= MASK_BITS
        self.queue_id(())

    # Interning -------------------------------------------------------------------------------------------------

    def local_id(self, side: int, local: Local) -> int:
        ids = self._local_ids[side]
        number = ids.get(local)
        if number is None:
            number = ids[local] = len(ids)
            assert number < ID_MAX
            self.locals[side].append(local)
            self.vm[side].append(local.vm)
            self.down[side].append(local.party.channel is Channel.DOWN)
            if side == S:
                self.waits.append(local.party.pending is not None)
        return number

    def queue_id(self, queue: tuple[int, ...]) -> int:
        number = self._queue_ids.get(queue)
        if number is None:
            number = self._queue_ids[queue] = len(self._queue_ids)
            assert number < QUEUE_MAX
            self.queues.append(queue)
        return number

    def frame_id(self, frame: Statement) -> int:
        number = self._frame_ids.get(frame)
        if number is None:
            number = self._frame_ids[frame] = len(self._frame_ids)
            self.frames.append(frame)
        return number

    def label_id(self, label: str) -> int:
        number = self._label_ids.get(label)
        if number is None:
            number = self._label_ids[label] = len(self._label_ids)
            self.labels.append(label)
        return number

    def budget_id(self, cost: Cost) -> int:
        number = self._budget_ids.get(cost)
        if number is None:
            number = self._budget_ids[cost] = len(self._budget_ids)
            assert number < BUDGET_MAX
            self._budgets.append(cost)
        return number

    def receipt_bit(self, cell: Cell) -> int:
        return self._receipt_bits.get(cell, 0)

    # States ----------------------------------------------------------------------------------------------------

    def first(self) -> int:
        receipts = sum(self._receipt_bits.values()) if self.rules.foreign_receipts else 0
        return pack(
            Facts(
                self.local_id(S, first_local(Side.SOURCE)),
                self.local_id(D, first_local(Side.DESTINATION)),
                0,
                0,
                receipts,
                self.budget_id(self.bounds.cost),
                Flow.ON,
                1,
                0,
                0,
                0,
                0,
            )
        )

    def budget(self, facts: Facts) -> Cost:
        return self._budgets[facts.budget]

    def append(self, queue: int, sends: tuple[int, ...]) -> int:
        key = (queue, sends)
        number = self._appended.get(key)
        if number is None:
            unread = list(self.queues[queue])
            for frame in sends:
                if (not unread or unread[-1] != frame) and len(unread) < self.unread_max:
                    unread.append(frame)
            number = self._appended[key] = self.queue_id(tuple(unread))
        return number

    def stale(self, queue: int) -> int:
        """The queue once the source asks something else."""
        number = self._staled.get(queue)
        if number is None:
            frames: list[int] = []
            for frame in self.queues[queue]:
                aged = self.frame_id(stale_frame(self.frames[frame]))
                if not frames or frames[-1] != aged:
                    frames.append(aged)
            number = self._staled[queue] = self.queue_id(tuple(frames))
        return number

    # What can happen -------------------------------------------------------------------------------------------

    def successors(self, state: int) -> Iterator[tuple[int, int]]:
        """(label, state) of everything that can happen next.

        Raises:
            Violation: it must never happen. `label` and the rest are in its arguments.
        """
        facts = unpack(state)
        (s, d, qsd, qds, receipts, budget, flow, s_fresh, d_fresh, cut_sd, cut_ds, late) = facts
        cut = cut_sd and cut_ds
        died = self._budgets[budget].deaths < self.bounds.deaths
        for me in (S, D):
            mine, other = (s, d) if me == S else (d, s)
            other_vm = self.vm[D - me][other]
            inbox, outbox = (qds, qsd) if me == S else (qsd, qds)
            down = self.down[me][mine]
            head = self.queues[inbox][0] if inbox and not down else -1
            for move in self.moves(me, mine, flow, receipts, head, bool(cut) and not down, budget):
                n_inbox, n_outbox, n_s_fresh, n_d_fresh = inbox, outbox, s_fresh, d_fresh
                n_cut_sd, n_cut_ds, n_late = cut_sd, cut_ds, late
                if move.pops:
                    n_inbox = self.queue_id(self.queues[inbox][1:])
                if move.forgets and me == S:
                    n_inbox, n_outbox = self.stale(n_inbox), self.stale(n_outbox)
                if move.sends and not (cut_sd if me == S else cut_ds):
                    n_outbox = self.append(n_outbox, move.sends)
                if move.stop_called:
                    n_late = int(other_vm == Vm.GONE)
                if move.violations:
                    raise Violation(move.violations[0], move.label)
                if move.ops:
                    mine_fresh, other_fresh = (n_s_fresh, n_d_fresh) if me == S else (n_d_fresh, n_s_fresh)
                    for op in move.ops:
                        if op == "run":
                            if other_vm == Vm.RUNNING:
                                raise Violation("two runners", move.label)
                            if not mine_fresh:
                                raise Violation(
                                    f"the {SIDES[me].word} starts the guest from an image older than the guest",
                                    move.label,
                                )
                            other_fresh = 0
                        elif op == "destroy":
                            if not died and mine_fresh and (other_vm == Vm.GONE or not other_fresh):
                                raise Violation("the last good image is destroyed", move.label)
                        elif op == "cut":
                            n_cut_sd = n_cut_ds = 1
                    n_s_fresh, n_d_fresh = (mine_fresh, other_fresh) if me == S else (other_fresh, mine_fresh)
                if move.gave_up and s_fresh and (other_vm == Vm.GONE or not d_fresh):
                    if not died:
                        raise Violation("the source gives the last good image up", move.label)
                    if n_late:
                        raise Violation(
                            "the source gives the last good image up on evidence older than the STOP, "
                            "which came after the death of the destination's VM",
                            move.label,
                        )
                local = move.local
                if self.down[me][local]:
                    n_cut_sd = n_cut_ds = 1
                    n_inbox = 0
                if me == S:
                    if n_late and not self.waits[local]:
                        n_late = 0
                    yield (
                        move.label,
                        pack(
                            Facts(
                                local,
                                d,
                                n_outbox,
                                n_inbox,
                                receipts | move.wrote,
                                move.budget,
                                move.flow,
                                n_s_fresh,
                                n_d_fresh,
                                n_cut_sd,
                                n_cut_ds,
                                n_late,
                            )
                        ),
                    )
                else:
                    yield (
                        move.label,
                        pack(
                            Facts(
                                s,
                                local,
                                n_inbox,
                                n_outbox,
                                receipts | move.wrote,
                                move.budget,
                                move.flow,
                                n_s_fresh,
                                n_d_fresh,
                                n_cut_sd,
                                n_cut_ds,
                                n_late,
                            )
                        ),
                    )
        yield from self._weather(facts)

    def _weather(self, facts: Facts) -> Iterator[tuple[int, int]]:
        """What happens to VMs and channel without any shim's doing."""
        s_local = self.locals[S][facts.source]
        d_local = self.locals[D][facts.destination]
        flow = facts.flow
        if flow == Flow.ON:
            if s_local.vm == Vm.RUNNING and d_local.vm == Vm.STOPPED:
                stopped = self.local_id(S, s_local._replace(vm=Vm.STOPPED))
                yield (
                    self.label_id("all memory is at the destination, the source's VM has stopped the guest"),
                    pack(facts._replace(source=stopped, flow=Flow.SWITCHING, destination_fresh=1)),
                )
            yield (
                self.label_id("the transfer breaks"),
                pack(facts._replace(flow=Flow.BROKEN, cut_to_destination=1, cut_to_source=1)),
            )
        elif flow == Flow.SWITCHING:
            yield (
                self.label_id("the source's VM learns that it has completed"),
                pack(facts._replace(flow=Flow.DONE)),
            )
            resumed = self.local_id(S, s_local._replace(vm=Vm.RUNNING))
            yield (
                self.label_id("the source's VM does not learn that it has completed, and goes on by itself"),
                pack(
                    facts._replace(
                        source=resumed,
                        flow=Flow.RESUMED,
                        destination_fresh=0,
                        cut_to_destination=1,
                        cut_to_source=1,
                    )
                ),
            )
        elif flow == Flow.DONE:
            if not facts.cut_to_destination:
                yield (
                    self.label_id("the channel is cut towards the destination"),
                    pack(facts._replace(cut_to_destination=1)),
                )
            if not facts.cut_to_source:
                yield (
                    self.label_id("the channel is cut towards the source"),
                    pack(facts._replace(cut_to_source=1)),
                )
        yield from self._deaths(facts, s_local, d_local)

    def _deaths(self, facts: Facts, s_local: Local, d_local: Local) -> Iterator[tuple[int, int]]:
        left = self._budgets[facts.budget]
        if not left.deaths:
            return
        budget = self.budget_id(left._replace(deaths=left.deaths - 1))
        if s_local.vm != Vm.GONE:
            flow = {Flow.ON: Flow.BROKEN, Flow.SWITCHING: Flow.RESUMED}.get(facts.flow, facts.flow)
            cut = {"cut_to_destination": 1, "cut_to_source": 1} if flow != facts.flow else {}
            gone = self.local_id(S, s_local._replace(vm=Vm.GONE))
            yield (
                self.label_id("the source's VM dies"),
                pack(facts._replace(source=gone, flow=flow, budget=budget, source_fresh=0, **cut)),
            )
        if d_local.vm != Vm.GONE:
            flow = Flow.BROKEN if facts.flow == Flow.ON else facts.flow
            cut = {"cut_to_destination": 1, "cut_to_source": 1} if flow != facts.flow else {}
            gone = self.local_id(D, d_local._replace(vm=Vm.GONE))
            yield (
                self.label_id("the destination's VM dies"),
                pack(facts._replace(destination=gone, flow=flow, budget=budget, destination_fresh=0, **cut)),
            )

    # What one side can do --------------------------------------------------------------------------------------

    def moves(
        self, me: int, local: int, flow: int, receipts: int, head: int, cut: bool, budget: int
    ) -> list[Move]:
        key = (me, local, flow, receipts, head, cut, budget)
        found = self._moves.get(key)
        if found is None:
            found = self._moves[key] = list(self._moves_of(me, local, flow, receipts, head, cut, budget))
        return found

    def _moves_of(
        self, me: int, number: int, flow: int, receipts: int, head: int, cut: bool, budget: int
    ) -> Iterator[Move]:
        local = self.locals[me][number]
        left = self._budgets[budget]
        for text, event in self.events(me, local, flow, receipts, head, cut):
            pops = isinstance(event, FrameRead)
            for outcome in self.shims[me].outcomes(local, event, flow):
                if outcome.cost.within(left):
                    yield self._move(me, text, event, outcome, left, pops)
                    if pops and self.channel_repeats:
                        yield self._move(
                            me, f"{text}, which will come again", event, outcome, left, pops=False
                        )
        if left.crashes:
            for outcome in self.shims[me].crash(local, flow):
                if outcome.cost.within(left):
                    yield self._move(me, f"the {SIDES[me].word}:", None, outcome, left, pops=False)

    def _move(
        self, me: int, text: str, event: RightEvent | None, outcome: Outcome, left: Cost, pops: bool
    ) -> Move:
        sends, ops, wrote, violations, gave_up = [], [], 0, [], False
        for op in outcome.ops:
            if op.kind == "send":
                assert isinstance(op.what, Statement)
                sends.append(self.frame_id(op.what))
            elif op.kind == "wrote":
                assert isinstance(op.what, Cell)
                wrote |= self.receipt_bit(op.what)
                gave_up |= op.what is Cell.GONE
            elif op.kind == "violation":
                violations.append(str(op.what))
            elif op.kind in ("run", "destroy", "cut"):
                ops.append(op.kind)
        return Move(
            label=self.label_id("; ".join((_told(text, outcome), *outcome.notes))),
            local=self.local_id(me, outcome.local),
            flow=outcome.flow,
            pops=pops,
            sends=tuple(sends),
            forgets=outcome.forgets,
            ops=tuple(ops),
            wrote=wrote,
            gave_up=gave_up,
            stop_called=me == S and isinstance(event, CallMade) and event.call is Call.STOP,
            budget=self.budget_id(Cost(*(a - b for a, b in zip(left, outcome.cost, strict=True)))),
            violations=tuple(violations),
        )

    def events(
        self, me: int, local: Local, flow: int, receipts: int, head: int, cut: bool
    ) -> Iterator[tuple[str, RightEvent]]:
        """What can happen to this side now, each with its part of a story."""
        side, party = SIDES[me], local.party
        word = side.word
        if local.vm == Vm.GONE and party.vm_alive and party.state is not State.IDLE:
            yield f"the {word} notices that its VM is dead", VmDied()
            if self.rules.deaths_are_noticed:
                return
        if flow in (Flow.SWITCHING, Flow.DONE, Flow.RESUMED) and me == D and local.disk.cell is Cell.NONE:
            yield "the destination notices that the memory is complete", MemoryComplete()
        if flow == Flow.BROKEN and me == D and local.disk.cell is Cell.NONE:
            yield "the destination notices that the transfer has failed", TransferFailed()
        if me == S and not party.complete and flow == Flow.DONE and party.state is not State.IDLE:
            yield "the source notices that the memory is complete", MemoryComplete()
        if me == S and not party.complete and party.cell is Cell.OPEN and flow in (Flow.RESUMED, Flow.BROKEN):
            yield "the source notices that the transfer has failed", TransferFailed()
        if head >= 0 and party.complete and party.state is not State.IDLE:
            frame = self.frames[head]
            yield f"the {word} reads {shown(frame)}", FrameRead(frame)
        if cut:
            yield f"the {word} notices that the channel is lost", ChannelLost()
        if party.pending is not None:
            yield f"the {word} waits no longer", AskTimedOut()
            return
        for call in CALLS:
            yield f"{call.value} on the {word}", CallMade(call)
            for cell, bit in self._receipt_bits.items():
                if receipts & bit and (call, party.cell, cell) in self.looked_at:
                    yield (
                        f"{call.value} on the {word} with the receipt {cell.name}",
                        CallMade(call, Statement(cell)),
                    )


def shown(frame: Statement) -> str:
    ask = {Ask.NOTHING: "", Ask.TELL: " and a question", Ask.GIVE: " and the wish to have the right"}[
        frame.ask
    ]
    return f"{frame.cell.name}{ask}"


def _told(text: str, outcome: Outcome) -> str:
    told = [text]
    wrote = [op.what.name for op in outcome.ops if op.kind == "wrote" and isinstance(op.what, Cell)]
    if wrote:
        told.append(f"it writes {', '.join(wrote)}")
    sent = [shown(op.what) for op in outcome.ops if op.kind == "send" and isinstance(op.what, Statement)]
    if sent:
        told.append(f"it sends {', '.join(sent)}")
    if any(op.kind == "run" for op in outcome.ops):
        told.append("THE GUEST STARTS")
    if any(op.kind == "destroy" for op in outcome.ops):
        told.append("its VM is destroyed")
    if outcome.reply is not None:
        told.append("OK" if outcome.reply.refusal is None else outcome.reply.refusal.kind.__name__)
    return "; ".join(told)
