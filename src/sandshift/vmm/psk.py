"""TLS-PSK credentials as QEMU takes them: a folder with one file, there only as long as QEMU needs it.

The sending side reads the file when the object is made, the receiving side at the handshake (GnuTLS looks the key up by
the user's name). Source: qemu/docs/system/tls.rst, "TLS PSK".
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from sandshift.errors import Rejected

KEYS_FILE: Final = "keys.psk"
USER_NAME: Final = "sandshift"
KEY_BYTES: Final = 32


def write_keys(folder: Path, psk: bytes) -> None:
    """Make `folder` (0700) with the key file (0600) in it, in place of what was there.

    Raises:
        Rejected: the key has not KEY_BYTES.
    """
    if len(psk) != KEY_BYTES:
        raise Rejected(f"channel key of {len(psk)} bytes: it must have {KEY_BYTES}")
    remove_keys(folder)
    folder.mkdir(mode=0o700)
    fd = os.open(folder / KEYS_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(f"{USER_NAME}:{psk.hex()}\n")


def remove_keys(folder: Path) -> None:
    """Idempotent."""
    shutil.rmtree(folder, ignore_errors=True)


def credentials(object_id: str, folder: Path, *, sending: bool) -> dict[str, object]:
    """object-add's argument."""
    common: dict[str, object] = {"qom-type": "tls-creds-psk", "id": object_id, "dir": str(folder)}
    if sending:
        return {**common, "endpoint": "client", "username": USER_NAME}
    return {**common, "endpoint": "server"}
