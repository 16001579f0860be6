"""Clients that drive a session call by call, in orders that the coordinator never uses."""

from __future__ import annotations

import asyncio

from sandshift.fleet import saga as steps
from sandshift.fleet.calls import Calls
from sandshift.fleet.request import Migration
from sandshift.session.states import Side
from sandshift.wire.migration import options_pb2


async def transfer(migration: Migration, calls: Calls) -> None:
    """Up to where everything is on the destination and nothing is decided."""
    await calls.connect(Side.SOURCE)
    for step in (*steps.BEFORE_TRANSFER,):
        await calls.make(step)
    calls.let_go_of_channel()
    await asyncio.gather(*(calls.make(step) for step in steps.TRANSFERS))
    async for told in calls.shim(Side.DESTINATION).notifications(migration.session_id):
        if told.notification.phase == options_pb2.PHASE_DONE:
            return


async def stop_first(migration: Migration) -> None:
    """STOP on the source, then RESUME on the destination: in between the right lies in HELD.

    Raises what the first call that fails does; a session that it leaves is finished by the coordinator.
    """
    calls = Calls(migration)
    try:
        await transfer(migration, calls)
        order = (
            steps.SOURCE_STOP, steps.DESTINATION_RESUME, steps.SOURCE_CLEANUP, steps.DESTINATION_CLEANUP, steps.SOURCE_CLOSE,
        )  # fmt: skip
        for step in order:
            await calls.make(step)
    finally:
        await calls.close()
