"""The steps of a migration at which something dies, as data: where each is, and how far the session is there.

How far: the durable words of both sides (docs/explanation/right-to-run.md) and how much of the memory is on the
destination. From these, and from nothing else, `cases.py` says what must come of a death there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

from sandshift.session.statement import Cell
from sandshift.session.states import Side


class Plan(enum.Enum):
    """Who drives the session up to the fault."""

    MOVE = "move"
    """The coordinator, forward."""
    TURN_BACK = "turn back"
    """The coordinator, interrupted while memory flows: it winds back."""
    STOP_FIRST = "stop first"
    """A plain client that calls STOP on the source before RESUME on the destination: so the right lies in HELD."""


class Memory(enum.Enum):
    """How much of the guest the destination has."""

    PART = "part"
    LAST = "last"
    """QEMU is at the last of it: nobody outside can tell whether all is there."""
    WHOLE = "whole"
    """All, and the source's shim has not written that down."""
    ABOUT_RECORDED = "about recorded"
    """All, and whether the source's shim has written it down is a matter of a millisecond."""
    RECORDED = "recorded"
    """All, and the source's shim has written it down."""


class There(enum.Flag):
    """What exists at a step."""

    SOURCE_SHIM = enum.auto()
    SOURCE_VM = enum.auto()
    DESTINATION_SHIM = enum.auto()
    DESTINATION_VM = enum.auto()
    CHANNEL = enum.auto()
    """Both sides have their end."""


ALONE: Final = There.SOURCE_SHIM | There.SOURCE_VM
IMPORTED: Final = ALONE | There.DESTINATION_SHIM
PREPARED: Final = IMPORTED | There.DESTINATION_VM
CONNECTED: Final = PREPARED | There.CHANNEL
MOVED: Final = CONNECTED & ~There.SOURCE_VM
LEFT: Final = MOVED & ~There.SOURCE_SHIM
"""The source has nothing any more, and its shim is being ended."""


@dataclass(frozen=True, slots=True)
class Step:
    """One place where a shim can be stopped. `point` is what its hook says there (shim_under_test.py)."""

    name: str
    side: Side
    point: str
    source: Cell | None
    destination: Cell | None
    memory: Memory
    there: There = CONNECTED
    major: bool = False
    """Every victim is tried here; elsewhere only the shims and whoever else is named in cases.py."""
    plan: Plan = Plan.MOVE
    count: int = 1
    held_is_told: bool = False
    """The destination's HELD is on its way to the STOP that asked: on that word the source may give its image up."""


S, D = Side.SOURCE, Side.DESTINATION
_OPEN, _RELEASED, _GONE, _KEPT = Cell.OPEN, Cell.RELEASED, Cell.GONE, Cell.KEPT
_NONE, _READY, _HELD, _STARTING, _RUNNING, _REFUSED = (
    Cell.NONE, Cell.READY, Cell.HELD, Cell.STARTING, Cell.RUNNING, Cell.REFUSED,
)  # fmt: skip
_PART, _LAST, _WHOLE, _ABOUT, _RECORDED = Memory

OPENING: Final = (
    Step("PrepareAndExport asked", S, "asked PrepareAndExportSandbox", None, None, _PART, ALONE),
    Step("source's books not begun", S, "opens the books", None, None, _PART, ALONE),
    Step("source's books begun", S, "opened the books", _OPEN, None, _PART, ALONE),
    Step("PrepareAndExport done", S, "answers PrepareAndExportSandbox", _OPEN, None, _PART, ALONE, major=True),
    Step("Import asked", D, "asked ImportSandbox", _OPEN, None, _PART, IMPORTED),
    Step("destination's books not begun", D, "opens the books", _OPEN, None, _PART, IMPORTED),
    Step("destination's books begun", D, "opened the books", _OPEN, _NONE, _PART, IMPORTED),
    Step("Import done", D, "answers ImportSandbox", _OPEN, _NONE, _PART, IMPORTED, major=True),
    Step("Prepare asked", D, "asked PrepareSandbox", _OPEN, _NONE, _PART, IMPORTED),
    Step("record Prepared not written", D, "writes NONE DestinationPrepared", _OPEN, _NONE, _PART, PREPARED),
    Step("Prepare done", D, "answers PrepareSandbox", _OPEN, _NONE, _PART, PREPARED, major=True),
    Step("CreateDuplicateSocket on destination asked", D, "asked CreateDuplicateSocket", _OPEN, _NONE, _PART, PREPARED),
    Step("record SocketReady on destination", D, "wrote NONE SocketReady", _OPEN, _NONE, _PART, PREPARED),
    Step("CreateDuplicateSocket on destination done", D, "answers CreateDuplicateSocket", _OPEN, _NONE, _PART, PREPARED, major=True),
    Step("CreateDuplicateSocket on source asked", S, "asked CreateDuplicateSocket", _OPEN, _NONE, _PART, PREPARED),
    Step("record SocketReady on source", S, "wrote OPEN SocketReady", _OPEN, _NONE, _PART),
    Step("CreateDuplicateSocket on source done", S, "answers CreateDuplicateSocket", _OPEN, _NONE, _PART, major=True),
)  # fmt: skip
"""Every call up to TransferSandbox: asked, on disk, done and not answered."""

TRANSFER: Final = (
    Step("TransferSandbox on source asked", S, "asked TransferSandbox", _OPEN, _NONE, _PART),
    Step("TransferSandbox on destination asked", D, "asked TransferSandbox", _OPEN, _NONE, _PART),
    Step("record Transferring on source", S, "wrote OPEN Transferring", _OPEN, _NONE, _PART),
    Step("record Transferring on destination", D, "wrote NONE Transferring", _OPEN, _NONE, _PART),
    Step("setup", S, "event MIGRATION setup", _OPEN, _NONE, _PART, major=True),
    Step("brownout begins", S, "event MIGRATION active", _OPEN, _NONE, _PART),
    Step("brownout, first bytes on destination", D, "event MIGRATION active", _OPEN, _NONE, _PART),
    Step("brownout, first pass", S, "event tick", _OPEN, _NONE, _PART, major=True),
    Step("brownout, second pass", S, "event MIGRATION_PASS 2", _OPEN, _NONE, _PART, major=True),
    Step("blackout begins", S, "event STOP", _OPEN, _NONE, _PART),
    Step("pre-switchover", S, "event MIGRATION pre-switchover", _OPEN, _NONE, _PART, major=True),
    Step("device state", S, "switched over", _OPEN, _NONE, _LAST, major=True),
    Step("destination's QEMU completed", D, "event MIGRATION completed", _OPEN, _NONE, _LAST),
    Step("source's QEMU completed", S, "event MIGRATION completed", _OPEN, _NONE, _WHOLE, major=True),
)  # fmt: skip
"""Every phase, from the call to the last byte."""

HANDOVER: Final = (
    Step("record READY not written", D, "writes READY TransferCompleted", _OPEN, _NONE, _LAST),
    Step("record READY written", D, "wrote READY TransferCompleted", _OPEN, _READY, _ABOUT),
    Step("record Completed not written", S, "writes OPEN TransferCompleted", _OPEN, _NONE, _WHOLE),
    Step("record Completed written", S, "wrote OPEN TransferCompleted", _OPEN, _READY, _RECORDED, major=True),
    Step("frame OPEN sent", S, "sent OPEN NOTHING", _OPEN, _READY, _RECORDED),
    Step("frame OPEN heard", D, "heard OPEN NOTHING", _OPEN, _READY, _RECORDED),
    Step("RESUME on destination asked", D, "asked FinalizeSandbox RESUME", _OPEN, _READY, _ABOUT, major=True),
    Step("frame READY not sent", D, "sends READY GIVE", _OPEN, _READY, _ABOUT),
    Step("frame READY sent", D, "sent READY GIVE", _OPEN, _READY, _ABOUT),
    Step("frame READY heard", S, "heard READY GIVE", _OPEN, _READY, _RECORDED),
    Step("record RELEASED not written", S, "writes RELEASED TransferCompleted", _OPEN, _READY, _RECORDED),
    Step("record RELEASED written", S, "wrote RELEASED TransferCompleted", _RELEASED, _READY, _RECORDED, major=True),
    Step("frame RELEASED sent", S, "sent RELEASED TELL", _RELEASED, _READY, _RECORDED),
    Step("frame RELEASED heard", D, "heard RELEASED TELL", _RELEASED, _READY, _RECORDED),
    Step("records HELD and STARTING not written", D, "writes STARTING TransferCompleted", _RELEASED, _READY, _RECORDED),
    Step("records HELD and STARTING written", D, "wrote STARTING TransferCompleted", _RELEASED, _STARTING, _RECORDED, major=True),
    Step("vCPUs not started", D, "starts the vCPUs", _RELEASED, _STARTING, _RECORDED),
    Step("vCPUs started", D, "started the vCPUs", _RELEASED, _STARTING, _RECORDED, major=True),
    Step("record RUNNING not written", D, "writes RUNNING Finalized", _RELEASED, _STARTING, _RECORDED),
    Step("record RUNNING written", D, "wrote RUNNING Finalized", _RELEASED, _RUNNING, _RECORDED, major=True),
    Step("frame RUNNING not sent", D, "sends RUNNING NOTHING", _RELEASED, _RUNNING, _RECORDED),
    Step("frame RUNNING sent", D, "sent RUNNING NOTHING", _RELEASED, _RUNNING, _RECORDED),
    Step("frame RUNNING heard", S, "heard RUNNING NOTHING", _RELEASED, _RUNNING, _RECORDED),
    Step("RESUME on destination done", D, "answers FinalizeSandbox RESUME", _RELEASED, _RUNNING, _RECORDED),
)  # fmt: skip
"""Every record and every frame, from completed to RUNNING."""

ENDING: Final = (
    Step("STOP on source asked", S, "asked FinalizeSandbox STOP", _RELEASED, _RUNNING, _RECORDED, major=True),
    Step("record GONE not written", S, "writes GONE TransferCompleted", _RELEASED, _RUNNING, _RECORDED),
    Step("record GONE written", S, "wrote GONE TransferCompleted", _GONE, _RUNNING, _RECORDED, major=True),
    Step("source's VM destroyed", S, "destroyed the VM", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("record Finalized on source", S, "wrote GONE Finalized", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("STOP on source done", S, "answers FinalizeSandbox STOP", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("Cleanup on source asked", S, "asked Cleanup", _GONE, _RUNNING, _RECORDED, MOVED, major=True),
    Step("source's statement kept", S, "kept the statement", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("record Idle on source", S, "wrote GONE Idle", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("source's books not removed", S, "closes the session", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("Cleanup on source done", S, "answers Cleanup", _GONE, _RUNNING, _RECORDED, MOVED),
    Step("Cleanup on destination asked", D, "asked Cleanup", _GONE, _RUNNING, _RECORDED, MOVED, major=True),
    Step("destination's statement kept", D, "kept the statement", _GONE, _RUNNING, _RECORDED, LEFT),
    Step("record Idle on destination", D, "wrote RUNNING Idle", _GONE, _RUNNING, _RECORDED, LEFT),
    Step("destination's books not removed", D, "closes the session", _GONE, _RUNNING, _RECORDED, LEFT),
    Step("Cleanup on destination done", D, "answers Cleanup", _GONE, _RUNNING, _RECORDED, LEFT),
)  # fmt: skip
"""From the decision to the last answer."""

STOPPING_FIRST: Final = tuple(
    replace(step, plan=Plan.STOP_FIRST)
    for step in (
        Step("STOP before RESUME, asked", S, "asked FinalizeSandbox STOP", _OPEN, _READY, _RECORDED, major=True),
        Step("frame OPEN with a question heard", D, "heard OPEN TELL", _OPEN, _READY, _RECORDED),
        Step("frame READY without a wish heard", S, "heard READY NOTHING", _OPEN, _READY, _RECORDED),
        Step("record RELEASED by STOP", S, "wrote RELEASED TransferCompleted", _RELEASED, _READY, _RECORDED),
        Step("frame RELEASED with a question sent", S, "sent RELEASED TELL", _RELEASED, _READY, _RECORDED, held_is_told=True),
        Step("record HELD not written", D, "writes HELD TransferCompleted", _RELEASED, _READY, _RECORDED, held_is_told=True),
        Step("record HELD written", D, "wrote HELD TransferCompleted", _RELEASED, _HELD, _RECORDED, major=True, held_is_told=True),
        Step("frame HELD sent", D, "sent HELD NOTHING", _RELEASED, _HELD, _RECORDED, held_is_told=True),
        Step("frame HELD heard", S, "heard HELD NOTHING", _RELEASED, _HELD, _RECORDED, major=True, held_is_told=True),
        Step("record GONE written, destination HELD", S, "wrote GONE TransferCompleted", _GONE, _HELD, _RECORDED, major=True),
        Step("source's VM destroyed, destination HELD", S, "destroyed the VM", _GONE, _HELD, _RECORDED, MOVED),
        Step("RESUME with the source gone, asked", D, "asked FinalizeSandbox RESUME", _GONE, _HELD, _RECORDED, MOVED, major=True),
        Step("record STARTING with the source gone", D, "wrote STARTING TransferCompleted", _GONE, _STARTING, _RECORDED, MOVED),
        Step("vCPUs started with the source gone", D, "started the vCPUs", _GONE, _STARTING, _RECORDED, MOVED, major=True),
    )
)  # fmt: skip
"""STOP on the source before RESUME on the destination, so that HELD lies alone on the disk."""

TURNING_BACK: Final = tuple(
    replace(step, plan=Plan.TURN_BACK)
    for step in (
        Step("Cancel on source asked", S, "asked Cancel", _OPEN, _NONE, _PART, PREPARED, major=True),
        Step("record KEPT written", S, "wrote KEPT Cancelling", _KEPT, _NONE, _PART, PREPARED),
        Step("Cancel on source done", S, "answers Cancel", _KEPT, _NONE, _PART, PREPARED),
        Step("Cancel on destination asked", D, "asked Cancel", _OPEN, _NONE, _PART, PREPARED),
        Step("record REFUSED written", D, "wrote REFUSED Failed", _KEPT, _REFUSED, _PART, PREPARED),
        Step("Cancel on destination done", D, "answers Cancel", _KEPT, _REFUSED, _PART, PREPARED),
        Step("RESUME on source asked", S, "asked FinalizeSandbox RESUME", _KEPT, _NONE, _PART, PREPARED, major=True),
        Step("vCPUs on source started", S, "started the vCPUs", _KEPT, _NONE, _PART, PREPARED),
        Step("RESUME on source done", S, "answers FinalizeSandbox RESUME", _KEPT, _NONE, _PART, PREPARED),
        Step("STOP on destination asked", D, "asked FinalizeSandbox STOP", _KEPT, _REFUSED, _PART, PREPARED, major=True),
        Step("destination's VM destroyed", D, "destroyed the VM", _KEPT, _REFUSED, _PART, IMPORTED),
        Step("STOP on destination done", D, "answers FinalizeSandbox STOP", _KEPT, _REFUSED, _PART, IMPORTED),
        Step("Cleanup on source of a move undone", S, "kept the statement", _KEPT, _REFUSED, _PART, IMPORTED),
        Step("Cleanup on destination of a move undone", D, "kept the statement", _KEPT, _REFUSED, _PART, IMPORTED),
    )
)  # fmt: skip
"""Interrupted while memory flows: the way back."""

CHAPTERS: Final = {
    "Opening: up to the sockets": OPENING,
    "Transfer: every phase": TRANSFER,
    "Handover: every record and every frame": HANDOVER,
    "Ending: from the decision to the last answer": ENDING,
    "STOP before RESUME: HELD alone": STOPPING_FIRST,
    "Turning back: every call and record of the way back": TURNING_BACK,
}
STEPS: Final = tuple(step for steps in CHAPTERS.values() for step in steps)
