"""A counterexample as a story: what happened, in order, and what is wrong in the end."""

from __future__ import annotations

from dataclasses import dataclass

from sandshift.session.right import (
    AskTimedOut,
    CallMade,
    ChannelLost,
    FrameRead,
    MemoryComplete,
    RightEvent,
    VmDied,
)
from sandshift.session.statement import Cell
from tests.explore.facts import SIDES, Facts, Violation
from tests.explore.rescue import Rescue, Rescuer
from tests.explore.world import shown


@dataclass(frozen=True)
class Story:
    what: str
    """The harm."""
    events: tuple[str, ...]
    """All that happened, in order, to the harm; or to where the recovery began."""
    recovery: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{number:3}. {event}" for number, event in enumerate(self.events, start=1)]
        if self.recovery:
            lines += ["     then the recovery:"]
            lines += [f"   {number:3}. {event}" for number, event in enumerate(self.recovery, start=1)]
        return "\n".join([*lines, f"   => {self.what}"])


def story_of(what: str, events: list[str], rescuer: Rescuer, facts: Facts) -> Story:
    """The story of a recovery that fails from `facts`: it is run once more and listened to."""
    run = Rescue(rescuer, facts)
    try:
        run.settle()
        run.failure()
    except Violation:
        pass
    recovery = [] if not rescuer.cut else ["the channel is cut for ever"]
    for me, event, outcome in run.told:
        wrote = [op.what.name for op in outcome.ops if op.kind == "wrote" and isinstance(op.what, Cell)]
        acted = [
            {"run": "THE GUEST STARTS", "destroy": "its VM is destroyed"}.get(op.kind, "")
            for op in outcome.ops
        ]
        replied = []
        if outcome.reply is not None:
            refusal = outcome.reply.refusal
            replied = ["OK" if refusal is None else f"{refusal.kind.__name__}: {refusal.message}"]
        wrote = [f"it writes {', '.join(wrote)}"] if wrote else []
        told = [_event(SIDES[me].word, rescuer.events[event]), *wrote, *filter(None, acted), *replied]
        recovery.append("; ".join(told))
    return Story(what, tuple(events), tuple(recovery))


def _event(word: str, event: RightEvent) -> str:
    match event:
        case CallMade():
            receipt = f" with the receipt {event.receipt.cell.name}" if event.receipt else ""
            return f"{event.call.value} on the {word}{receipt}"
        case FrameRead():
            return f"the {word} reads {shown(event.statement)}"
        case AskTimedOut():
            return f"the {word} waits no longer"
        case ChannelLost():
            return f"the {word} notices that the channel is lost"
        case VmDied():
            return f"the {word} notices that its VM is dead"
        case MemoryComplete():
            return f"the {word} notices that the memory is complete"
        case _:
            return f"the {word} notices that the transfer has failed"
