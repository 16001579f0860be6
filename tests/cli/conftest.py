"""A `sandshift` command line against scripted shims that live in a thread of their own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandshift.cli.main import main
from sandshift.fleet import recover
from sandshift.fleet.host import Host
from tests.fleet.fake_shims import FakeShim, World, use


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)


Sandshift = Callable[..., Ended]


@pytest.fixture
def sandshift(capfd: pytest.CaptureFixture[str]) -> Sandshift:
    """Run a command line in this process."""

    def run(*words: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        stdout, stderr = capfd.readouterr()
        assert "Traceback" not in stderr or "--verbose" in words
        return Ended(int(ended.value.code or 0), stdout, stderr)

    return run


class Farm:
    """The two hosts and their shims, on a loop that runs while commands do."""

    def __init__(self, world: World, loop: asyncio.AbstractEventLoop) -> None:
        self.world = world
        self._loop = loop

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    def config(self, name: str) -> Path:
        """The configuration file of a host, for --config."""
        config = self.world.host(name).config
        path = self.world.folder / f"{name}.toml"
        path.write_text(
            f'[host]\nname = "{name}"\n[places]\nrun_dir = "{config.places.run_dir}"\n'
            f'state_dir = "{config.places.state_dir}"\ncache_dir = "{self.world.folder}/cache"\n'
        )
        return path

    def run_sandbox(self, name: str = "a") -> FakeShim:
        shim: FakeShim = self.do(self.world.run_sandbox(name))
        return shim

    def elsewhere(
        self, work: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """`work`, done on the shims' loop and awaited on the command's."""

        async def call(host: Host, *place: str) -> Any:
            future: Future[Any] = asyncio.run_coroutine_threadsafe(work(host, *place), self._loop)
            return await asyncio.wrap_future(future)

        return call


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shims", daemon=True)
    thread.start()

    async def make() -> World:
        return World(tmp_path)

    world = asyncio.run_coroutine_threadsafe(make(), loop).result(timeout=10)
    made = Farm(world, loop)
    start, delete = world.start, world.delete
    world.start, world.delete = made.elsewhere(start), made.elsewhere(delete)  # type: ignore[method-assign]
    use(world, monkeypatch)
    world.start, world.delete = start, delete  # type: ignore[method-assign]
    monkeypatch.setattr(recover, "PAUSE_S", 0.01)
    yield made
    made.do(world.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
