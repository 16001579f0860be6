"""What a test may ask of the machine beyond Python. On a person's machine it is skipped without; in CI that is a failure."""

from __future__ import annotations

import os
import shutil

import pytest

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="needs root and ip: run ./run test as root, which installs it",
)
"""For network namespaces, taps and bridges."""
