"""containerd's rule for identifiers, and how a stranger's text is shown in a message. Loads nothing that is slow."""

from __future__ import annotations

import re
from typing import Final

from sandshift.errors import Rejected

IDENTIFIER_CHARACTERS_MAX: Final = 76
"""Source: containerd pkg/identifiers."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*", re.ASCII)
_SHOWN_CHARACTERS_MAX: Final = 80


def shown(value: str) -> str:
    """`value` as it may stand in a message: quoted, escaped, cut at 80 characters."""
    cut = value if len(value) <= _SHOWN_CHARACTERS_MAX else value[:_SHOWN_CHARACTERS_MAX] + "..."
    return repr(cut)


def identifier(name: str, value: str) -> str:
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
