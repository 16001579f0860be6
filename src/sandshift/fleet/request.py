"""What is asked of a coordinator: which sandbox, from where to where, under which session, how."""

from __future__ import annotations

from dataclasses import dataclass

from sandshift.errors import Rejected
from sandshift.fleet.host import NAMESPACE_DEFAULT, Host
from sandshift.session.options import Options
from sandshift.session.states import Side


@dataclass(frozen=True, slots=True)
class Migration:
    """One move of one sandbox."""

    source: Host
    destination: Host
    sandbox_id: str
    session_id: str
    namespace: str = NAMESPACE_DEFAULT
    options: Options | None = None
    """None: the defaults of both hosts."""
    deadline_s: float | None = None
    """Bound on the transfer itself; None: the shims' own."""
    close_source: bool = True
    """End the source's shim after a move. Off where containerd owns it."""

    containers_wait_s: float = 120.0
    """How long the sandbox's containers may take to be created at the destination, by whoever makes containers there."""

    destination_id: str = ""
    """The sandbox at the destination that waits for it, which somebody else made and owns (containerd, with the
    annotation io.sandshift.migration.destination). Empty: one of the same id is made for the move."""

    def id_on(self, side: Side) -> str:
        """What the sandbox is called there."""
        return (self.destination_id or self.sandbox_id) if side is Side.DESTINATION else self.sandbox_id

    def host(self, side: Side) -> Host:
        return self.source if side is Side.SOURCE else self.destination

    def where(self, side: Side) -> str:
        """For messages: "the source, host a"."""
        return f"the {side.word}, host {self.host(side).name}"

    def check(self) -> None:
        """Raises Rejected if both hosts are the same place."""
        if self.source.is_same_place_as(self.destination):
            raise Rejected(
                f"host {self.destination.name} keeps its sandboxes in the same places as host {self.source.name}:"
                " give the destination its own places.run_dir and places.state_dir"
            )
