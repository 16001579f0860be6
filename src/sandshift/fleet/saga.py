"""One migration as its coordinator sees it: which call is next, on which side. All of it, and nothing but that.

    FORWARD   S.EXPORT > D.OPEN > D.IMPORT > D.PREPARE > S.CONNECT > D.SOCKET > S.SOCKET
              > S.TRANSFER with D.TRANSFER > D.RESUME > S.STOP > S.CLEANUP with D.CLEANUP > both REPORT
              > S.CLOSE
    UNWIND    S.CANCEL > S.RESUME > D.CANCEL > D.STOP > S.CLEANUP with D.CLEANUP > both REPORT > D.CLOSE
    RECOVER   nobody here knows who holds the right to run: `fleet/recover.py` asks both sides
    ENDED     nothing is left to call

The rules that matter, each a test:

* S.STOP is called only after D.RESUME has succeeded (right-to-run.md section 8).
* D.RESUME is called as soon as the destination says that it has everything: nothing comes between, for the guest runs
  nowhere meanwhile. Its Transfer alone answering OK is not that word: a destination that nothing reached for 2 s
  answers so too (contract 4.7). One that answered before the source is asked again after it.
* Until D.RESUME is asked for, a failure is undone by UNWIND: the source keeps the right and needs nobody's consent.
  From then on a failure means RECOVER: the answer may be lost and the guest run.
* S.EXPORT comes first: the source has one session at a time, so of two coordinators with different sessions only one
  ever touches the destination.
* D.CANCEL is called only after S.RESUME has succeeded: what is cancelled is discarded, and where the source's VM has
  died the destination may hold the only copy.
* A call that may have had an effect is never left behind: UNWIND waits for its answer first, save for the transfers,
  which CANCEL ends.
* D.SOCKET comes before S.SOCKET: of two coordinators at work on one session exactly one hands the destination its
  socket, and only that one goes on to the source. So two never pair the ends of different connections; the other
  one joins the transfer.

Sans-IO: `take_due` names the calls to make now, `answered`, `failed`, `memory_complete` and `cancel` tell what came of
them. No clock, no socket.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sandshift.errors import AlreadyThere, Cancelled, IllegalMove, SandshiftError, TimedOut, Unavailable
from sandshift.session.states import Side


class Call(enum.Enum):
    """What can be asked of a side. The value is the method's name on the wire, or ours for what is no call."""

    OPEN = "OpenDestination"
    """Start the destination's shim and make a sandbox there that may only receive."""
    EXPORT = "PrepareAndExportSandbox"
    IMPORT = "ImportSandbox"
    PREPARE = "PrepareSandbox"
    CONNECT = "Connect"
    """Make the one connection between the two hosts."""
    SOCKET = "CreateDuplicateSocket"
    TRANSFER = "TransferSandbox"
    RESUME = "FinalizeSandbox(RESUME)"
    STOP = "FinalizeSandbox(STOP)"
    CANCEL = "Cancel"
    CLEANUP = "Cleanup"
    REPORT = "Report"
    """Read the session's report, while its shim is there. A side that has none changes nothing."""
    CLOSE = "CloseShim"
    """End the shim of the side that has no guest any more."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call on one side."""

    side: Side
    call: Call

    def __str__(self) -> str:
        return f"{self.call.value} on the {self.side.word}"


def _source(call: Call) -> Step:
    return Step(Side.SOURCE, call)


def _destination(call: Call) -> Step:
    return Step(Side.DESTINATION, call)


OPEN: Final = _destination(Call.OPEN)
EXPORT: Final = _source(Call.EXPORT)
IMPORT: Final = _destination(Call.IMPORT)
PREPARE: Final = _destination(Call.PREPARE)
CONNECT: Final = _source(Call.CONNECT)
DESTINATION_SOCKET: Final = _destination(Call.SOCKET)
SOURCE_SOCKET: Final = _source(Call.SOCKET)
SOURCE_TRANSFER: Final = _source(Call.TRANSFER)
DESTINATION_TRANSFER: Final = _destination(Call.TRANSFER)
DESTINATION_RESUME: Final = _destination(Call.RESUME)
SOURCE_STOP: Final = _source(Call.STOP)
SOURCE_CANCEL: Final = _source(Call.CANCEL)
DESTINATION_CANCEL: Final = _destination(Call.CANCEL)
SOURCE_RESUME: Final = _source(Call.RESUME)
DESTINATION_STOP: Final = _destination(Call.STOP)
SOURCE_CLEANUP: Final = _source(Call.CLEANUP)
DESTINATION_CLEANUP: Final = _destination(Call.CLEANUP)
SOURCE_REPORT: Final = _source(Call.REPORT)
DESTINATION_REPORT: Final = _destination(Call.REPORT)
SOURCE_CLOSE: Final = _source(Call.CLOSE)
DESTINATION_CLOSE: Final = _destination(Call.CLOSE)

BEFORE_TRANSFER: Final = (EXPORT, OPEN, IMPORT, PREPARE, CONNECT, DESTINATION_SOCKET, SOURCE_SOCKET)
TRANSFERS: Final = frozenset({SOURCE_TRANSFER, DESTINATION_TRANSFER})

FORWARD: Final[Mapping[Step, tuple[Step, ...]]] = MappingProxyType(
    {
        EXPORT: (),
        OPEN: (EXPORT,),
        IMPORT: (EXPORT, OPEN),
        PREPARE: (IMPORT,),
        CONNECT: (PREPARE,),
        DESTINATION_SOCKET: (CONNECT,),
        SOURCE_SOCKET: (DESTINATION_SOCKET,),
        DESTINATION_TRANSFER: (SOURCE_SOCKET,),
        SOURCE_TRANSFER: (SOURCE_SOCKET,),
        DESTINATION_RESUME: (SOURCE_TRANSFER, DESTINATION_TRANSFER),  # or `memory_complete`
        SOURCE_STOP: (DESTINATION_RESUME,),
        SOURCE_CLEANUP: (SOURCE_STOP,),
        DESTINATION_CLEANUP: (SOURCE_STOP,),
        SOURCE_REPORT: (SOURCE_CLEANUP,),
        DESTINATION_REPORT: (DESTINATION_CLEANUP,),
        SOURCE_CLOSE: (SOURCE_REPORT,),
    }
)
"""Each step of the way forward, and what must have succeeded before it."""

UNWIND: Final[Mapping[Step, tuple[Step, ...]]] = MappingProxyType(
    {
        SOURCE_CANCEL: (),
        SOURCE_RESUME: (
            SOURCE_CANCEL,
        ),  # the source needs nobody's consent: it must not wait for a dead peer
        DESTINATION_CANCEL: (
            SOURCE_CANCEL,
            SOURCE_RESUME,
        ),  # cancelled, it is discarded: and it may hold the only copy until the source is known to run
        DESTINATION_STOP: (SOURCE_CANCEL, DESTINATION_CANCEL, SOURCE_RESUME),
        SOURCE_CLEANUP: (SOURCE_CANCEL, DESTINATION_CANCEL, SOURCE_RESUME, DESTINATION_STOP),
        DESTINATION_CLEANUP: (SOURCE_CANCEL, DESTINATION_CANCEL, SOURCE_RESUME, DESTINATION_STOP),
        SOURCE_REPORT: (SOURCE_CLEANUP,),
        DESTINATION_REPORT: (DESTINATION_CLEANUP,),
        DESTINATION_CLOSE: (SOURCE_RESUME, DESTINATION_STOP, SOURCE_CLEANUP, DESTINATION_REPORT),
    }
)
"""Each step of the way back, and what must have been answered before it."""

LAST: Final = frozenset(
    {SOURCE_CLEANUP, DESTINATION_CLEANUP, SOURCE_REPORT, DESTINATION_REPORT, SOURCE_CLOSE}
)
"""Done, these end the way forward."""


class Mode(enum.Enum):
    FORWARD = "forward"
    UNWIND = "unwind"
    RECOVER = "recover"
    ENDED = "ended"


class Outcome(enum.Enum):
    """How a migration ended."""

    MOVED = "moved"
    """The guest runs on the destination."""
    UNDONE = "undone"
    """The guest runs on the source, as before."""
    REFUSED = "refused"
    """The source did not even begin: nothing had changed."""
    CRASHED = "crashed"
    """The guest's VM died where it had the right to run."""
    UNDECIDED = "undecided"
    """A person must decide: right-to-run.md section 9."""


class Saga:
    """One migration, from its first call to its last."""

    def __init__(self, *, done: Iterable[Step] = ()) -> None:
        """`done`: what a former coordinator of this session has achieved already."""
        self.mode = Mode.FORWARD
        self.outcome: Outcome | None = None
        self.reason: SandshiftError | None = None
        """What went wrong first. None while all is well, and after a move that succeeded."""
        self.failed_step: Step | None = None
        self.warnings: list[str] = []
        """What went wrong after the outcome was certain, and does not change it."""
        self._asked: set[Step] = set(done)
        self._done: set[Step] = set(done)
        self._pending: set[Step] = set()
        self._uncertain: set[Step] = set()
        self._memory_complete = False
        self._unwinding = False
        self._answered_early = False

    @property
    def pending(self) -> frozenset[Step]:
        return frozenset(self._pending)

    def has_done(self, step: Step) -> bool:
        """Whether `step` has succeeded."""
        return step in self._done

    def take_due(self) -> tuple[Step, ...]:
        """The calls to make now, all at the same time. Each is named once, save a destination's Transfer: `answered`."""
        if self.mode is Mode.UNWIND and not self._unwinding and self._pending <= TRANSFERS:
            self._begin_to_unwind()
        due = tuple(step for step in self._plan() if step not in self._asked and self._is_due(step))
        self._asked.update(due)
        self._pending.update(due)
        if not due:
            self._end_if_nothing_is_left()
        return due

    def answered(self, step: Step) -> None:
        """`step` succeeded.

        A destination's Transfer that answered before the source's is asked again after it, and then ends with the
        transfer: its first answer may only mean that nothing had reached it yet.
        """
        self._settle(step)
        self._done.add(step)
        if step == DESTINATION_TRANSFER and SOURCE_TRANSFER in self._pending:
            self._answered_early = True
        elif step == SOURCE_TRANSFER and self._answered_early:
            self._answered_early = False
            if DESTINATION_RESUME not in self._asked:
                self._done.discard(DESTINATION_TRANSFER)
                self._asked.discard(DESTINATION_TRANSFER)

    def failed(self, step: Step, error: SandshiftError) -> None:
        """`step` did not succeed, or nobody knows whether it did."""
        self._settle(step)
        if isinstance(error, Unavailable | TimedOut):
            self._uncertain.add(step)
        if self.mode is Mode.FORWARD:
            self._fail_forward(step, error)
        elif self.mode is Mode.UNWIND:
            self._fail_unwind(step, error)

    def memory_complete(self) -> None:
        """The destination has notified DONE/SUCCESS: it has everything, and is paused."""
        self._memory_complete = True

    def cancel(self, why: str) -> bool:
        """Turn back, if that is still possible; answers whether it is."""
        if self.mode is not Mode.FORWARD or DESTINATION_RESUME in self._asked:
            return False
        self._turn_back(None, Cancelled(why))
        return True

    # What is due

    def _plan(self) -> Mapping[Step, tuple[Step, ...]]:
        match self.mode:
            case Mode.FORWARD:
                return FORWARD
            case Mode.UNWIND if self._unwinding:
                return UNWIND
            case _:
                return {}

    def _is_due(self, step: Step) -> bool:
        if self.mode is Mode.UNWIND:
            return all(need in self._asked and need not in self._pending for need in UNWIND[step])
        if step == DESTINATION_RESUME and self._memory_complete:
            return DESTINATION_TRANSFER in self._asked or SOURCE_TRANSFER in self._done
        return all(need in self._done for need in FORWARD[step])

    def _settle(self, step: Step) -> None:
        if step not in self._pending:
            raise IllegalMove(f"{step} was answered, but nobody asked for it")
        self._pending.discard(step)

    # What a failure means

    def _fail_forward(self, step: Step, error: SandshiftError) -> None:
        if step.call is Call.REPORT:
            self._done.add(step)
        elif step.call in (Call.CLEANUP, Call.CLOSE):
            self.warnings.append(f"{step}: {error.message}")
            self._done.add(step)
            if step == SOURCE_CLEANUP:
                self._skip(SOURCE_REPORT, SOURCE_CLOSE)
        elif step == DESTINATION_SOCKET and isinstance(error, AlreadyThere):
            self._skip(DESTINATION_SOCKET, SOURCE_SOCKET)
        elif DESTINATION_RESUME in self._done:
            if step == SOURCE_STOP:
                self._recover(step, error)
        elif step == DESTINATION_RESUME:
            self._recover(step, error)
        elif DESTINATION_RESUME not in self._asked:
            self._turn_back(step, error)

    def _fail_unwind(self, step: Step, error: SandshiftError) -> None:
        if step in (SOURCE_RESUME, DESTINATION_STOP):
            self._recover(step, error)
        elif step.call in (Call.CLEANUP, Call.CLOSE):
            self.warnings.append(f"{step}: {error.message}")

    def _recover(self, step: Step | None, error: SandshiftError) -> None:
        self._blame(step, error)
        self.mode = Mode.RECOVER

    def _blame(self, step: Step | None, error: SandshiftError) -> None:
        if self.reason is None:
            self.reason, self.failed_step = error, step

    def _turn_back(self, step: Step | None, error: SandshiftError) -> None:
        self._blame(step, error)
        self.mode = Mode.UNWIND

    def _begin_to_unwind(self) -> None:
        """Every call but the transfers has its answer by now: strike from UNWIND what has nothing to undo."""
        self._unwinding = True
        if not self._may_have_happened(EXPORT):
            self._strike(SOURCE_CANCEL, SOURCE_RESUME, SOURCE_CLEANUP, SOURCE_REPORT)
        if not self._may_have_happened(IMPORT):
            self._strike(DESTINATION_CANCEL, DESTINATION_STOP, DESTINATION_CLEANUP, DESTINATION_REPORT)
        if not self._may_have_happened(OPEN):
            self._strike(DESTINATION_CLOSE)

    def _may_have_happened(self, step: Step) -> bool:
        return step in self._done or step in self._uncertain

    def _skip(self, *steps: Step) -> None:
        """Count as done what another coordinator does, or what has become pointless."""
        self._asked.update(steps)
        self._done.update(steps)

    def _strike(self, *steps: Step) -> None:
        self._asked.update(steps)

    def _end_if_nothing_is_left(self) -> None:
        if self._pending - TRANSFERS or self.mode in (Mode.RECOVER, Mode.ENDED):
            return  # a transfer may still be pending: CANCEL or the other side's success has ended it
        if self.mode is Mode.FORWARD and self._done >= LAST:
            self.mode, self.outcome = Mode.ENDED, Outcome.MOVED
        elif self.mode is Mode.UNWIND and set(UNWIND) <= self._asked:
            began = self._may_have_happened(EXPORT)
            self.mode, self.outcome = Mode.ENDED, Outcome.UNDONE if began else Outcome.REFUSED
