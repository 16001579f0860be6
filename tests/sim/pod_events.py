"""What containerd was told of containers, on one host: in order, and once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.sim.pods import Caller

ORDER: Final = ("/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete")
EXEC_ORDER: Final = ("/tasks/exec-added", "/tasks/exec-started", "/tasks/exit")


def wrong_events(caller: Caller) -> list[str]:
    told: dict[tuple[str, str], list[tuple[str, Any]]] = {}
    for topic, event in caller.containerd.events():
        container_id = getattr(event, "container_id", "")
        if container_id:
            told.setdefault((container_id, _exec_of(event)), []).append((topic, event))
    wrong = []
    for (container_id, exec_id), events in told.items():
        wrong += _wrong(caller, f"{container_id}{' ' + exec_id if exec_id else ''}", exec_id, events)
    return wrong + _untold(caller, told)


def _exec_of(event: Any) -> str:
    """Empty: of the container itself."""
    exec_id = str(getattr(event, "exec_id", "") or getattr(event, "id", ""))
    return "" if exec_id == event.container_id else exec_id


def _wrong(caller: Caller, what: str, exec_id: str, events: list[tuple[str, Any]]) -> list[str]:
    topics = [topic for topic, _ in events]
    order = EXEC_ORDER if exec_id else ORDER
    places = [order.index(topic) for topic in topics]
    found = []
    if len(set(topics)) != len(topics):
        found.append(f"containerd of {caller.host.name} was told twice of {what}: {' '.join(topics)}")
    elif places != sorted(places):
        found.append(f"containerd of {caller.host.name} was told out of order of {what}: {' '.join(topics)}")
    return found


def _untold(caller: Caller, told: dict[tuple[str, str], list[tuple[str, Any]]]) -> list[str]:
    """Ends that a caller's Wait has heard of and containerd has not, or otherwise."""
    found = []
    for stay in caller.pods.stays:
        if stay.host != caller.host.name:
            continue
        for exec_id, code in stay.exits.items():
            events = told.get((stay.container_id, exec_id), [])
            codes = [event.exit_status for topic, event in events if topic == "/tasks/exit"]
            if not codes and not caller.host.kills and not caller.was_away:
                found.append(f"containerd of {stay.host} was not told of the end of {stay} {exec_id}")
            elif any(one != code for one in codes):
                found.append(
                    f"containerd of {stay.host} was told that {stay} {exec_id} ended with {codes}, not {code}"
                )
    return found
