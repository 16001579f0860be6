"""The report of an ended session, from the host that was one of its sides."""

from __future__ import annotations

import contextlib
import secrets
from typing import Final

from sandshift.errors import NotFound, Unavailable
from sandshift.fleet.host import Host
from sandshift.fleet.shim_client import Shim, connect
from sandshift.fleet.visitor import visitor
from sandshift.wire.sandshift import shim_pb2

REPORT_S: Final = 10.0
_ID_BYTES: Final = 4


async def fetch_report(host: Host, namespace: str, session_id: str) -> bytes:
    """The report as JSON. Any shim of the host can read it; where none lives, one is started for the question.

    Raises:
        NotFound: the host has none of that session.
    """
    for place in host.sandboxes():
        with contextlib.suppress(Unavailable):
            shim = await connect(host, *place)
            async with contextlib.aclosing(shim):
                return await _ask(shim, session_id)
    async with visitor(host, namespace, f"report-{secrets.token_hex(_ID_BYTES)}") as shim:
        return await _ask(shim, session_id)


async def _ask(shim: Shim, session_id: str) -> bytes:
    request = shim_pb2.ReportRequest(session_id=session_id)
    try:
        return (await shim.said(shim.shim.report(request, timeout_s=REPORT_S))).report
    except NotFound as error:
        raise NotFound(
            f"host {shim.host.name} has no report of session {session_id!r}; ask the other host of that move, or look"
            " whether it has ended with 'sandshift session show'"
        ) from error
