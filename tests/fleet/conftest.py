from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from sandshift.fleet import recover
from tests.fleet.fake_shims import World, use


@pytest_asyncio.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Two hosts, "a" and "b", without a sandbox."""
    monkeypatch.setattr(recover, "PAUSE_S", 0.01)
    made = use(World(tmp_path), monkeypatch)
    yield made
    await made.close()
