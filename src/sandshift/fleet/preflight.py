"""Can this sandbox move, to there? Asked of both sides and of the network between them; nothing moves, nothing stays.

The source says what of it stands in the way and describes the sandbox; a shim started for the question on the
destination looks at the description; and the two hosts are really connected once.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from sandshift.errors import AlreadyThere, Blocker, SandshiftError
from sandshift.fleet.channel import make_channel
from sandshift.fleet.request import Migration
from sandshift.fleet.shim_client import Shim, connect
from sandshift.fleet.visitor import visitor
from sandshift.session.options import to_proto
from sandshift.session.states import Side
from sandshift.wire.sandshift import shim_pb2

PREFLIGHT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """One blocker, and which side it is about."""

    side: Side
    blocker: Blocker


@dataclass(frozen=True, slots=True)
class Check:
    """What stands in the way of a migration. Empty `found`: nothing does."""

    found: tuple[Found, ...]
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.found

    def document(self) -> dict[str, object]:
        """As JSON shows it: docs/reference/cli.md, "sandshift migrate --check"."""
        return {
            "ok": self.ok,
            "blockers": [
                {
                    "side": each.side.word,
                    "subject": each.blocker.subject,
                    "problem": each.blocker.problem,
                    "remedy": each.blocker.remedy,
                }
                for each in self.found
            ],
            "warnings": list(self.warnings),
        }


async def preflight(migration: Migration) -> Check:
    """Ask everybody. Changes nothing on either host.

    Raises:
        NotFound, Unavailable: the source's shim is not there. Rejected: both hosts are the same place, or a
        configuration is wrong.
    """
    migration.check()
    found: list[Found] = []
    request = shim_pb2.PreflightRequest()
    if migration.options is not None:
        request.init_options.CopyFrom(to_proto(migration.options))
    source = await connect(migration.source, migration.namespace, migration.sandbox_id)
    async with contextlib.aclosing(source):
        answer = await source.said(source.shim.preflight(request, timeout_s=PREFLIGHT_S))
    found += _blockers(Side.SOURCE, answer)
    warnings = list(answer.warnings)
    request.description = answer.description
    try:
        place = (migration.destination, migration.namespace, migration.id_on(Side.DESTINATION))
        async with _waiting(migration) if migration.destination_id else visitor(*place) as destination:
            answer = await destination.said(destination.shim.preflight(request, timeout_s=PREFLIGHT_S))
            found += _blockers(Side.DESTINATION, answer)
            warnings += answer.warnings
    except SandshiftError as error:
        found.append(Found(Side.DESTINATION, _no_shim(error, migration)))
    found += await _channel_blockers(migration)
    return Check(tuple(found), tuple(dict.fromkeys(warnings)))


@contextlib.asynccontextmanager
async def _waiting(migration: Migration) -> AsyncIterator[Shim]:
    """The sandbox that somebody else made at the destination."""
    shim = await connect(migration.destination, migration.namespace, migration.destination_id)
    async with contextlib.aclosing(shim):
        yield shim


async def _channel_blockers(migration: Migration) -> list[Found]:
    try:
        channel = await make_channel(migration.source, migration.destination)
    except SandshiftError as error:
        remedy = "correct host.migration_address and the route to it"
        return [Found(Side.DESTINATION, Blocker("network.channel", error.message, remedy))]
    channel.close()
    return []


def _no_shim(error: SandshiftError, migration: Migration) -> Blocker:
    remedy = f"make shims start on host {migration.destination.name}"
    if isinstance(error, AlreadyThere):
        remedy = "one id is one sandbox on a host"
    return Blocker("destination.shim", error.message, remedy)


def _blockers(side: Side, answer: shim_pb2.PreflightResponse) -> list[Found]:
    return [Found(side, Blocker(each.subject, each.problem, each.remedy)) for each in answer.blockers]
