"""Traps: a shim stands still at the step that was named, and nowhere else, for as long as the fault takes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.faults.trap import Hooks, listening


async def test_it_stands_still_at_the_named_step_until_the_fault_is_done(tmp_path: Path) -> None:
    (host := tmp_path / "a").mkdir()
    hooks = Hooks(host / "config.toml")
    story: list[str] = []

    def shim() -> None:
        for point in ("asked", "wrote", "asked", "answers"):
            hooks.step(point)
            story.append(point)

    async def fault() -> None:
        story.append("fault")

    async with listening(tmp_path) as traps:
        traps.arm(host, "asked", fault, count=2)
        await asyncio.to_thread(shim)
        assert story == ["asked", "wrote", "fault", "asked", "answers"]
        assert traps.sprung.is_set()
        await asyncio.to_thread(shim)
        assert story.count("fault") == 1


async def test_a_fault_that_fails_is_kept_and_the_shim_goes_on(tmp_path: Path) -> None:
    (host := tmp_path / "a").mkdir()

    async def fault() -> None:
        raise RuntimeError("nobody to kill")

    async with listening(tmp_path) as traps:
        traps.arm(host, "asked", fault)
        await asyncio.to_thread(Hooks(host / "config.toml").step, "asked")
        assert str(traps.error) == "nobody to kill"


async def test_a_trap_that_is_taken_away_stops_nobody(tmp_path: Path) -> None:
    (host := tmp_path / "a").mkdir()

    async def fault() -> None:
        raise AssertionError

    async with listening(tmp_path) as traps:
        traps.arm(host, "asked", fault)
        traps.disarm()
        Hooks(host / "config.toml").step("asked")
        assert not traps.sprung.is_set()
