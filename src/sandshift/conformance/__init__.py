"""A black-box suite for the Migration service: any shim, of any make, is held to the contract over its socket.

Nothing of the server is imported here: the contract's table, messages and promises are stated anew, so that a server and
its suite cannot be wrong together.
"""

from __future__ import annotations

from sandshift.conformance import (
    aided,
    bounds,
    cells,
    containers,
    older_clients,
    promises_ending,
    promises_moving,
    promises_opening,
    promises_tasks,
)
from sandshift.conformance.cases import CASES

__all__ = [
    "CASES",
    "aided",
    "bounds",
    "cells",
    "containers",
    "older_clients",
    "promises_ending",
    "promises_moving",
    "promises_opening",
    "promises_tasks",
]
