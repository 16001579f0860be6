"""containerd-shim-sandshift-v2: how containerd (or the node, or a person) starts, deletes and asks a shim.

Only what the asked-for action needs is loaded: `start` and `-info` are timed.
"""

from __future__ import annotations

import os
import sys

from sandshift.shim.arguments import parse_arguments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandshift.shim.arguments import Arguments


PRIVATE_UMASK = 0o077
"""Whatever is made by the shim, by QEMU or by `ip` for them is its owner's alone, whoever made it and with what mode."""


def main() -> None:
    os.umask(PRIVATE_UMASK)
    try:
        output = run(parse_arguments(sys.argv[1:]))
    except Exception as error:
        from sandshift.errors import SandshiftError  # noqa: PLC0415 - only for those that fail

        if not isinstance(error, SandshiftError):
            raise
        sys.stderr.write(f"containerd-shim-sandshift-v2: {error.message}\n")
        raise SystemExit(1) from error
    while output:
        output = output[os.write(1, output) :]


def run(arguments: Arguments) -> bytes:
    """What to print. Raises errors of `sandshift.errors`."""
    if arguments.version:
        from sandshift import VERSION  # noqa: PLC0415

        return f"containerd-shim-sandshift-v2:\n  Version:  {VERSION}\n".encode()
    if arguments.info:
        from sandshift.shim.info import runtime_info  # noqa: PLC0415

        return runtime_info()
    _check("-id", arguments.id)
    _check("-namespace", arguments.namespace)
    if arguments.action == "start":
        from sandshift.shim.ground import find_ground  # noqa: PLC0415
        from sandshift.shim.start import start  # noqa: PLC0415

        return start(arguments, find_ground())
    if arguments.action == "delete":
        from sandshift.config import load  # noqa: PLC0415
        from sandshift.shim.delete import delete  # noqa: PLC0415

        return delete(arguments, load())
    from sandshift.errors import Rejected  # noqa: PLC0415

    raise Rejected(
        "no action given: use start or delete, as containerd does; people use the sandshift command"
    )


def _check(name: str, value: str) -> None:
    """containerd's rule for identifiers. Plain ones are let through without loading what explains the others."""
    if value.isascii() and value.isalnum() and len(value) <= 64:
        return
    from sandshift.identifiers import identifier  # noqa: PLC0415

    identifier(name, value)


if __name__ == "__main__":
    main()
