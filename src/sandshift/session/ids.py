"""The names of a session's parts: which are valid, and how a session is called on disk.

A session id comes from a stranger and may be any printable text, so it is never part of a path: `session_name` is.
A sandbox or container id follows containerd's rule for identifiers and is safe in a path.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, NewType

from sandshift.errors import Rejected
from sandshift.session.statement import key_id
from sandshift.session.states import Side, check_session_id

SessionId = NewType("SessionId", str)
SandboxId = NewType("SandboxId", str)
ContainerId = NewType("ContainerId", str)

__all__ = [
    "ContainerId",
    "SandboxId",
    "SessionId",
    "Side",
    "container_id",
    "key_id",
    "sandbox_id",
    "session_id",
    "session_name",
    "shown",
]

IDENTIFIER_CHARACTERS_MAX: Final = 76
"""Source: containerd pkg/identifiers."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
_SHOWN_CHARACTERS_MAX: Final = 80


def session_id(value: str) -> SessionId:
    """Check a session id: 1 to 256 bytes of printable UTF-8 (contract 4.16).

    Raises:
        Rejected: it is empty, too long, or holds a character that is not printable.
    """
    check_session_id(value)
    return SessionId(value)


def sandbox_id(value: str) -> SandboxId:
    """Check a sandbox id by containerd's rule.

    Raises:
        Rejected: it breaks the rule.
    """
    return SandboxId(_identifier("sandbox_id", value))


def container_id(value: str) -> ContainerId:
    """Check a container id by containerd's rule.

    Raises:
        Rejected: it breaks the rule.
    """
    return ContainerId(_identifier("container id", value))


def session_name(session: SessionId) -> str:
    """Name of a session in paths: 64 hexadecimal digits."""
    return hashlib.sha256(session.encode()).hexdigest()


def shown(value: str) -> str:
    """`value` as it may stand in a message: quoted, escaped, cut at 80 characters."""
    cut = value if len(value) <= _SHOWN_CHARACTERS_MAX else value[:_SHOWN_CHARACTERS_MAX] + "..."
    return repr(cut)


def _identifier(name: str, value: str) -> str:
    """Letters and digits in runs joined by single '.', '_' or '-'; at most 76. Source: containerd pkg/identifiers."""
    if not value:
        raise Rejected(f"{name} is empty")
    if len(value) > IDENTIFIER_CHARACTERS_MAX:
        raise Rejected(
            f"{name} {shown(value)} has {len(value)} characters: at most {IDENTIFIER_CHARACTERS_MAX} are allowed"
        )
    if not _IDENTIFIER.fullmatch(value):
        raise Rejected(f"{name} {shown(value)} must be letters and digits, joined by single '.', '_' or '-'")
    return value
