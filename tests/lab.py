"""The two-host lab for system tests: the demo's own, with names, namespaces and folders of its own per test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from sandshift.cli.demo.lab import Lab, LabHost, open_lab
from sandshift.cli.demo.topology import CLIENT_ADDRESS, GUEST_ADDRESS, GUEST_MAC, PREFIX_LENGTH

__all__ = [
    "CLIENT_ADDRESS",
    "GUEST_ADDRESS",
    "GUEST_MAC",
    "PREFIX_LENGTH",
    "Lab",
    "LabHost",
    "lab",
    "open_lab",
]


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    """Use by ``from tests.lab import lab  # noqa: F401`` in a test file or a conftest."""
    async with open_lab() as made:
        yield made
