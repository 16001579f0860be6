"""Exit statuses of the `sandshift` command."""

from __future__ import annotations

from typing import Final

EXIT_FAILED: Final = 1
EXIT_UNDECIDED: Final = 3
"""A migration about which a person must decide: neither done nor undone."""
EXIT_INTERRUPTED: Final = 130
