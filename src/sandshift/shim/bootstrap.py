"""containerd-shim-sandshift-v2: how containerd (or the node, or a person) starts, deletes and asks a shim."""

from __future__ import annotations

import os
import sys
from typing import Final

from sandshift.config import load
from sandshift.errors import Rejected, SandshiftError
from sandshift.identifiers import identifier
from sandshift.shim.arguments import parse_arguments
from sandshift.shim.start import start

PRIVATE_UMASK: Final = 0o077
"""Whatever is made by the shim, by QEMU or by `ip` for them is its owner's alone, whoever made it and with what mode."""


def main() -> None:
    os.umask(PRIVATE_UMASK)
    try:
        arguments = parse_arguments(sys.argv[1:])
        if arguments.version:
            from sandshift import VERSION  # noqa: PLC0415

            output = f"containerd-shim-sandshift-v2:\n  Version:  {VERSION}\n".encode()
        elif arguments.info:
            from sandshift.shim.info import runtime_info  # noqa: PLC0415

            output = runtime_info()
        else:
            config = load()
            identifier("-id", arguments.id)
            identifier("-namespace", arguments.namespace)
            if arguments.action == "start":
                output = start(arguments, config)
            elif arguments.action == "delete":
                from sandshift.shim.delete import delete  # noqa: PLC0415

                output = delete(arguments, config)
            else:
                raise Rejected(
                    "no action given: use start or delete, as containerd does; people use the sandshift command"
                )
    except SandshiftError as error:
        sys.stderr.write(f"containerd-shim-sandshift-v2: {error.message}\n")
        raise SystemExit(1) from error
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
