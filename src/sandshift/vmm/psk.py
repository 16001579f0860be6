"""TLS-PSK credentials as QEMU takes them: a folder with a few small files, there only as long as QEMU needs it.

The sending side reads the key when the object is made, the receiving side at the handshake (GnuTLS looks the key up by
the user's name). Source: qemu/docs/system/tls.rst, "TLS PSK".

The receiving side is also given a Diffie-Hellman group. QEMU 10.0 searches for a random one of 2048 bits wherever it finds
none, which took 200 to 580 ms in its main loop (measured), at every transfer. Source: qemu/crypto/tlscreds.c,
qcrypto_tls_creds_get_dh_params_file().
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from sandshift.errors import Rejected

KEYS_FILE: Final = "keys.psk"
GROUP_FILE: Final = "dh-params.pem"
USER_NAME: Final = "sandshift"
KEY_BYTES: Final = 32
FFDHE3072: Final = """\
-----BEGIN DH PARAMETERS-----
MIIBiAKCAYEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEfz9zeNVs7ZRkDW7w09N75nAI4YbRvydbmyQd62R0mkff3
7lmMsPrBhtkcrv4TCYUTknC0EwyTvEN5RPT9RFLi103TZPLiHnH1S/9croKrnJ32
nuhtK8UiNjoNq8Uhl5sN6todv5pC1cRITgq80Gv6U93vPBsg7j/VnXwl5B0rZsYu
N///////////AgEC
-----END DH PARAMETERS-----
"""
"""A group that everybody may share, as hard as a 125-bit key. Source: RFC 7919, appendix A.2."""


def write_keys(folder: Path, psk: bytes) -> None:
    """Make `folder` (0700) with the key and the group (each 0600) in it, in place of what was there.

    Raises:
        Rejected: the key has not KEY_BYTES.
    """
    if len(psk) != KEY_BYTES:
        raise Rejected(f"channel key of {len(psk)} bytes: it must have {KEY_BYTES}")
    remove_keys(folder)
    folder.mkdir(mode=0o700)
    _write(folder / KEYS_FILE, f"{USER_NAME}:{psk.hex()}\n")
    _write(folder / GROUP_FILE, FFDHE3072)


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def remove_keys(folder: Path) -> None:
    """Idempotent."""
    shutil.rmtree(folder, ignore_errors=True)


def credentials(object_id: str, folder: Path, *, sending: bool) -> dict[str, object]:
    """object-add's argument."""
    common: dict[str, object] = {"qom-type": "tls-creds-psk", "id": object_id, "dir": str(folder)}
    if sending:
        return {**common, "endpoint": "client", "username": USER_NAME}
    return {**common, "endpoint": "server"}
