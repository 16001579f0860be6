"""VM sandboxes that move between Linux hosts while they run."""

from typing import Final

VERSION: Final = "0.1.0"
