"""The two sides of a migration, as the contract names them."""

from __future__ import annotations

import enum


class Side(enum.Enum):
    """Values are how the contract writes them."""

    SOURCE = "SRC"
    DESTINATION = "DST"

    @property
    def peer(self) -> Side:
        return Side.DESTINATION if self is Side.SOURCE else Side.SOURCE
