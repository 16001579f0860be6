"""What a shim loads only when it is needed: most of its code is for a sandbox, and a shim begins without one.

A service is made by the first call to one of its methods. What belongs to a sandbox is loaded with it. A shim that has one
loads the rest a little later (`load_rest`), so that nothing is looked for in the middle of a move, and so that a new version
that is installed under a running shim never mixes with it.
"""

from __future__ import annotations

import gc
import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

from ttrpc import Method

if TYPE_CHECKING:
    from collections.abc import Callable

    import ttrpc

REST: Final = (
    "sandshift.shim.boot",
    "sandshift.shim.creation",
    "sandshift.shim.migration.opening",
    "sandshift.shim.migration.reporting",
    "sandshift.shim.migration.restoring",
    "sandshift.shim.migration.service",
    "sandshift.shim.migration.views",
    "sandshift.shim.real_parts",
    "sandshift.shim.restore",
    "sandshift.shim.sandbox_service",
    "sandshift.shim.shim_service",
    "sandshift.shim.tasks.disks",
    "sandshift.shim.tasks.task_service",
    "sandshift.shim.usage",
)
"""Whatever a shim may come to need, by the modules that need it."""
REST_AFTER_S: Final = 3.0
"""After the sandbox is there: whoever starts it is still busy with its first container until then."""


def load_rest() -> None:
    """Idempotent. Blocks for 0.1 s the first time.

    What it has loaded stays, so the collector need not look at it: a full collection would take 4 ms, of a blackout perhaps.
    """
    missing = [name for name in REST if name not in sys.modules]
    if not missing:
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in missing:
            importlib.import_module(name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def register_late(
    server: ttrpc.Server,
    kind: type[ttrpc.Service],
    make: Callable[[], ttrpc.Service],
    *,
    also_as: str = "",
) -> None:
    """Serve `kind`, the generated base class, by what `make` makes when the first call comes; `also_as`: under that service name too."""
    made: list[ttrpc.Service] = []

    def service() -> ttrpc.Service:
        if not made:
            made.append(make())
        return made[0]

    def handler_of(attribute: str) -> Callable[..., Any]:
        def handle(request: Any, context: ttrpc.CallContext) -> Any:
            return getattr(service(), attribute)(request, context)

        return handle

    for method, attribute in kind.ttrpc_methods:
        handler = handler_of(attribute)
        server.add(method, handler)
        if also_as:
            older = Method(also_as, method.name, method.shape, method.request_type, method.response_type)
            server.add(older, handler)
