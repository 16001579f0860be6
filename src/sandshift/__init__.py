"""VM sandboxes that move between Linux hosts while they run."""

VERSION = "0.1.0"  # No Final: `typing` costs the shim's start 9 ms.
