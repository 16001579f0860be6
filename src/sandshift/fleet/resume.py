"""`migrate` again, with the id of an earlier session: anywhere, by anybody, also while another one is at it.

A move whose way forward is open goes on where it stands; any other is finished or undone by the rules of
`session/recovery.py`; an id that nobody knows is a new move.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sandshift.errors import IllegalMove, NotFound, SandshiftError
from sandshift.fleet import saga as steps
from sandshift.fleet.calls import Calls
from sandshift.fleet.driver import ignore, migrate, uninterrupted
from sandshift.fleet.recover import look, recover
from sandshift.fleet.request import Migration
from sandshift.fleet.result import MigrationResult, Update
from sandshift.fleet.views import Views, joinable
from sandshift.session.states import Side


async def migrate_or_resume(
    migration: Migration, *, on_update: Callable[[Update], None] = ignore
) -> MigrationResult:
    """Go on with the session, or finish it, or undo it; or begin it, if neither side has heard of it.

    Raises:
        Rejected: both hosts are the same place. NotFound: nobody knows the session, and the source has no such
        sandbox. Unavailable: nobody knows the session, and the source does not answer.
    """
    migration.check()
    was_there = {
        side: migration.host(side).has_shim(migration.namespace, migration.id_on(side)) for side in Side
    }
    calls = Calls(migration)
    try:
        try:
            views = await _look(migration, calls)
        except asyncio.CancelledError:
            await _send_visitors_home(calls, was_there)
            raise
        done = joinable(views, destination_open=was_there[Side.DESTINATION])
        if views.known and done is None:
            result = await uninterrupted(_recover(migration, calls))
            await _send_visitors_home(calls, was_there)
            return result
        if not done:
            await uninterrupted(_send_visitors_home(calls, was_there))
    finally:
        await calls.close()
    if not views.known and not was_there[Side.SOURCE]:
        raise NotFound(
            f"session {migration.session_id!r} is known on neither host, and host {migration.source.name} has no"
            f" sandbox {migration.sandbox_id} to move"
        )
    return await migrate(migration, on_update=on_update, done=done or ())


async def _look(migration: Migration, calls: Calls) -> Views:
    return Views(await look(migration, calls, Side.SOURCE), await look(migration, calls, Side.DESTINATION))


async def _send_visitors_home(calls: Calls, was_there: dict[Side, bool]) -> None:
    """End the shims that were only started to be asked."""
    for side, step in ((Side.SOURCE, steps.SOURCE_CLOSE), (Side.DESTINATION, steps.DESTINATION_CLOSE)):
        if not was_there[side]:
            try:
                await calls.make(step)
            except SandshiftError:
                continue  # it has something after all, and stays


async def _recover(migration: Migration, calls: Calls) -> MigrationResult:
    recovered = await recover(migration, calls)
    return MigrationResult(
        sandbox_id=migration.sandbox_id,
        session_id=migration.session_id,
        source=migration.source.name,
        destination=migration.destination.name,
        outcome=recovered.outcome,
        reason=IllegalMove(recovered.why) if recovered.why else None,
        calls=tuple(recovered.calls),
        warnings=recovered.warnings,
    )
