"""The libraries that every shim needs, without what these would load beside and no shim uses.

A host has as many shims as pods: this is a sixth of their memory and a third of the time to their first answer. It is done once, before
anything else is imported, and leaves no trace: what was kept out can be imported later as usual.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Final

ABSENT: Final = ("ssl", "typing_extensions")
"""asyncio and msgspec do without them. TLS is QEMU's; the second is only there beside a developer's tools."""
PURE: Final = "google.protobuf.internal.python_message"
"""protobuf's messages in Python with all that these need (text_format, decoder, pickle): imported by its C implementation
and not used by it. Source: protobuf 7.36, descriptor_pool.py and builder.py."""


def load_lightly() -> None:
    """Load asyncio, msgspec and protobuf."""
    absent = [name for name in ABSENT if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: "there is no such module"
    import asyncio  # noqa: F401, PLC0415

    import msgspec  # noqa: F401, PLC0415

    for name in absent:
        del sys.modules[name]
    _load_protobuf()


def _load_protobuf() -> None:
    from google.protobuf.internal import api_implementation  # noqa: PLC0415

    if PURE in sys.modules or api_implementation.Type() != "upb":
        return
    sys.modules[PURE] = ModuleType(PURE, "Not loaded: see sandshift.shim.lightly.")
    from google.protobuf.internal import builder  # noqa: F401, PLC0415

    del sys.modules[PURE]
    vars(sys.modules["google.protobuf.internal"]).pop("python_message", None)
