"""What containerd was told of containers, on one host: in order, and once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.sim.pods import Caller

ORDER: Final = ("/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete")
NOTE_S: Final = 0.02
"""A shim that is killed so soon after it has published may not have noted it yet: then the next one publishes it again."""
EXEC_ORDER: Final = ("/tasks/exec-added", "/tasks/exec-started", "/tasks/exit")


Told = tuple[str, Any, float]
"""Topic, event, when it was published."""


def wrong_events(caller: Caller) -> list[str]:
    told: dict[tuple[str, str], list[Told]] = {}
    stamps = [envelope.timestamp.ToNanoseconds() / 1e9 for envelope in caller.containerd.taken]
    for (topic, event), at_s in zip(caller.containerd.events(), stamps, strict=True):
        container_id = getattr(event, "container_id", "")
        if container_id:
            told.setdefault((container_id, _exec_of(event)), []).append((topic, event, at_s))
    wrong = []
    for (container_id, exec_id), events in told.items():
        wrong += _wrong(caller, f"{container_id}{' ' + exec_id if exec_id else ''}", exec_id, events)
    return wrong + _untold(caller, told) + _misled(caller)


def _misled(caller: Caller) -> list[str]:
    """That the sandbox has moved is said once for a session."""
    moved: set[str] = set()
    found = []
    for topic, event in caller.containerd.events():
        if topic == "/sandshift/migrated":
            if event.session_id in moved and not caller.host.kills:
                found.append(
                    f"containerd of {caller.host.name} was told twice that {event.session_id} has moved"
                )
            moved.add(event.session_id)
    return found


def _exec_of(event: Any) -> str:
    """Empty: of the container itself."""
    exec_id = str(getattr(event, "exec_id", "") or getattr(event, "id", ""))
    return "" if exec_id == event.container_id else exec_id


def _wrong(caller: Caller, what: str, exec_id: str, events: list[Told]) -> list[str]:
    order = EXEC_ORDER if exec_id else ORDER
    once: list[Told] = []
    found = []
    said = " ".join(topic for topic, _, _ in events)
    for told in events:
        before = next((one for one in once if one[0] == told[0]), None)
        if before is None:
            once.append(told)
        elif before[1] != told[1]:
            found.append(f"containerd of {caller.host.name} was told otherwise of {what}: {said}")
        elif not any(before[2] <= at_s <= before[2] + NOTE_S for at_s in caller.host.kills):
            found.append(f"containerd of {caller.host.name} was told twice of {what}: {said}")
    places = [order.index(topic) for topic, _, _ in once]
    if places != sorted(places):
        found.append(f"containerd of {caller.host.name} was told out of order of {what}: {said}")
    return found


def _untold(caller: Caller, told: dict[tuple[str, str], list[Told]]) -> list[str]:
    """Ends that a caller's Wait has heard of and containerd has not, or otherwise."""
    found = []
    for stay in caller.pods.stays:
        if stay.host != caller.host.name:
            continue
        for exec_id, code in stay.exits.items():
            events = told.get((stay.container_id, exec_id), [])
            codes = [event.exit_status for topic, event, _ in events if topic == "/tasks/exit"]
            heard_of = not exec_id or exec_id in stay.bound
            if heard_of and not codes and not caller.host.kills and not caller.was_away:
                found.append(f"containerd of {stay.host} was not told of the end of {stay} {exec_id}")
            elif any(one != code for one in codes):
                found.append(
                    f"containerd of {stay.host} was told that {stay} {exec_id} ended with {codes}, not {code}"
                )
    return found
