"""The shim before this one: two never work on one sandbox at the same time.

A shim that is told to end stops listening at once and then lets its open calls end, which write to the journal until
they have. Whoever is started meanwhile finds nobody listening, and waits here before it looks at anything.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
from typing import Final

from sandshift.shim.identity import started_ticks_of

log = logging.getLogger(__name__)

PREDECESSOR_S: Final = 15.0
"""A shim that ends takes a few seconds at most (serve.py, DRAIN_S); one that takes longer hangs, and is killed."""


def wait_for_end(record: str, *, patience_s: float = PREDECESSOR_S) -> None:
    """Return when the process of `record`, a shim's pid file, is no more. Blocks.

    It has stopped listening; after `patience_s` it gets a SIGKILL, which a shim may get at any moment.
    """
    process = _open(record)
    if process is None:
        return
    try:
        if select.select([process], [], [], 0)[0]:
            return
        log.warning("the shim before this one still ends: waiting for it")
        if not select.select([process], [], [], patience_s)[0]:
            log.warning("the shim before this one has not ended within %g s: it is killed", patience_s)
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])
    finally:
        os.close(process)


def _open(record: str) -> int | None:
    """A pidfd of the very process that `record` names; None if there is none any more, or it is this one."""
    try:
        named = json.loads(record)
        pid, started_ticks = int(named["pid"]), int(named["started_ticks"])
        if pid == os.getpid():
            return None
        process = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if started_ticks_of(pid) != started_ticks:
        os.close(process)
        return None
    return process
