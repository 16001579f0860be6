from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from sandshift.errors import Rejected
from sandshift.vmm import psk


def test_the_key_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    psk.write_keys(folder, bytes(range(32)))
    file = folder / "keys.psk"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == f"sandshift:{bytes(range(32)).hex()}\n"


def test_a_new_key_replaces_the_old_one(tmp_path: Path) -> None:
    psk.write_keys(tmp_path / "keys", bytes(32))
    psk.write_keys(tmp_path / "keys", bytes([1] * 32))
    assert (tmp_path / "keys/keys.psk").read_text().endswith("01\n")
    psk.remove_keys(tmp_path / "keys")
    psk.remove_keys(tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_a_short_key_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="channel key of 6 bytes: it must have 32") as raised:
        psk.write_keys(tmp_path / "keys", b"secret")
    assert "secret" not in str(raised.value)


def test_only_the_sending_side_names_its_user() -> None:
    sending = psk.credentials("a", Path("/keys"), sending=True)
    receiving = psk.credentials("a", Path("/keys"), sending=False)
    assert (sending["endpoint"], sending["username"]) == ("client", "sandshift")
    assert receiving["endpoint"] == "server"
    assert "username" not in receiving


def test_the_group_is_the_standards_and_its_prime_is_safe(tmp_path: Path) -> None:
    psk.write_keys(tmp_path / "keys", bytes(32))
    pem = (tmp_path / "keys/dh-params.pem").read_text()
    der = base64.b64decode("".join(pem.splitlines()[1:-1]))
    prime = int.from_bytes(der[8:-3], "big")
    assert der[-3:] == b"\x02\x01\x02", "its generator is 2"
    assert prime == 2**3072 - 2**3008 + (_e_times_two_to(2942) + 2625351) * 2**64 - 1, (
        "RFC 7919, appendix A.2"
    )
    assert all(pow(2, number - 1, number) == 1 for number in (prime, (prime - 1) // 2))


def _e_times_two_to(exponent: int) -> int:
    """The whole part of e * 2**exponent, by its series."""
    guard = 64
    term, total, number = 1 << (exponent + guard), 0, 0
    while term:
        total += term
        number += 1
        term //= number
    return total >> guard
