"""What the shim relies on of an agent's containers, the same for the real agent and for the fake guest's.

A module that imports all tests from here brings two fixtures: `guest`, a Guest or what stands for one, with nothing in it,
and `program`, which gives a process's args for a name that both know.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec
import pytest

from sandshift.errors import AlreadyThere, IllegalMove, NotFound, SandshiftError
from sandshift.sandbox.disks import GuestRootfs
from tests.agent.house import Sink

Program = Callable[..., dict]
"""The OCI process of a program by its name: say WORD, exit CODE, wait, cat, flood."""
PATIENCE_S = 60


async def create(guest, rootfs: GuestRootfs, name: str, process: dict, **how) -> int:
    spec = msgspec.json.encode({"ociVersion": "1.1.0", "root": {"path": "rootfs"}, **process})
    how = {"terminal": False, "stdin": False, **how}
    return await guest.containers.create(name, spec, rootfs, (), **how)


async def run(guest, rootfs: GuestRootfs, name: str, process: dict, **how) -> int:
    pid = await create(guest, rootfs, name, process, **how)
    await guest.containers.start(name)
    return pid


async def exec_(guest, name: str, exec_id: str, process: dict) -> int:
    spec = msgspec.json.encode(process["process"])
    return await guest.start_process(f"{name}:{exec_id}", [], container_id=name, process_spec=spec)


async def output(guest, process_id: str, stream: int = 1, base: int = 0) -> bytes:
    sink = Sink(base)
    async with asyncio.timeout(PATIENCE_S):
        await guest.follow_output(process_id, stream, sink.delivered, sink.take)
    return bytes(sink.data)


async def exit_of(guest, process_id: str) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return (await guest.wait_process(process_id)).code


async def remove(guest, *names: str) -> None:
    """End and forget containers, whatever became of them."""
    for name in names:
        with contextlib.suppress(SandshiftError):
            await guest.containers.resume(name)
        with contextlib.suppress(NotFound):
            await guest.signal_process(f"{name}:", 9)
            await exit_of(guest, f"{name}:")
        await guest.containers.delete(name)
    for one in await guest.list_processes():
        if one.process_id.partition(":")[0] in names:
            await exit_of(guest, one.process_id)
            await guest.forget_process(one.process_id)


async def test_an_init_waits_for_its_start(guest, rootfs, program):
    pid = await create(guest, rootfs, "c", program("say", "hello"))
    assert pid > 1
    following = asyncio.create_task(output(guest, "c:"))
    done, _ = await asyncio.wait([following], timeout=0.3)
    assert not done
    await guest.containers.start("c")
    assert await following == b"hello\n"
    assert await output(guest, "c:", 2) == b""
    assert await exit_of(guest, "c:") == 0
    await remove(guest, "c")


async def test_the_same_creation_again_is_no_other_and_another_is_refused(guest, rootfs, program):
    pid = await create(guest, rootfs, "c", program("wait"))
    assert await create(guest, rootfs, "c", program("wait")) == pid
    with pytest.raises(AlreadyThere):
        await create(guest, rootfs, "c", program("cat"))
    await guest.containers.start("c")
    await guest.containers.start("c")
    assert [one.pid for one in await guest.containers.pids("c") if one.process_id == "c:"] == [pid]
    await remove(guest, "c")


async def test_an_exit_is_the_same_until_it_is_forgotten(guest, rootfs, program):
    await run(guest, rootfs, "c", program("exit", "7"))
    first = await guest.wait_process("c:")
    assert first.code == 7
    assert first.exited_at_ns > 0
    await guest.containers.delete("c")
    await guest.containers.delete("c")
    assert await guest.wait_process("c:") == first
    await guest.forget_process("c:")
    await guest.forget_process("c:")
    with pytest.raises(NotFound):
        await guest.wait_process("c:")
    with pytest.raises(NotFound):
        await guest.containers.start("c")


async def test_what_runs_is_neither_deleted_nor_forgotten(guest, rootfs, program):
    await run(guest, rootfs, "c", program("wait"))
    with pytest.raises(IllegalMove):
        await guest.containers.delete("c")
    with pytest.raises(IllegalMove):
        await guest.forget_process("c:")
    await guest.signal_process("c:", 9)
    assert await exit_of(guest, "c:") == 137
    await guest.signal_process("c:", 9)
    await remove(guest, "c")


async def test_an_exec_session_needs_a_container(guest, rootfs, program):
    with pytest.raises(NotFound):
        await exec_(guest, "nobody", "e", program("exit", "1"))
    await run(guest, rootfs, "c", program("wait"))
    pid = await exec_(guest, "c", "e", program("say", "beside"))
    assert pid > 1
    assert await exec_(guest, "c", "e", program("say", "beside")) == pid
    assert await output(guest, "c:e") == b"beside\n"
    assert await exit_of(guest, "c:e") == 0
    await remove(guest, "c")


async def test_the_init_takes_its_exec_sessions_with_it(guest, rootfs, program):
    pid = await run(guest, rootfs, "c", program("wait"))
    other = await exec_(guest, "c", "e", program("wait"))
    pids = {one.process_id: one.pid for one in await guest.containers.pids("c") if one.process_id}
    assert pids == {"c:": pid, "c:e": other}
    await guest.signal_process("c:", 9)
    assert await exit_of(guest, "c:") == 137
    assert await exit_of(guest, "c:e") == 137
    await remove(guest, "c")


async def test_input_counts_once_and_ends_where_it_is_said(guest, rootfs, program):
    await run(guest, rootfs, "c", program("cat"), stdin=True)
    assert await guest.write_input("c:", 0, b"") == 0
    assert await guest.write_input("c:", 0, b"abc") == 3
    assert await guest.write_input("c:", 1, b"bcdef") == 6
    with pytest.raises(SandshiftError):
        await guest.write_input("c:", 9, b"beyond a gap")
    assert await guest.write_input("c:", 6, b"", eof=True) == 6
    assert await output(guest, "c:") == b"abcdef"
    assert await exit_of(guest, "c:") == 0
    await remove(guest, "c")


async def test_output_that_is_not_taken_stays_and_holds_its_process_up(guest, rootfs, program):
    await run(guest, rootfs, "c", program("flood"))
    sink = Sink()
    enough = asyncio.Event()

    def take(offset: int, data: bytes) -> int:
        if len(sink.data) < 100_000:
            sink.take(offset, data)
        if len(sink.data) >= 100_000:
            enough.set()
        return sink.delivered()

    following = asyncio.create_task(guest.follow_output("c:", 1, sink.delivered, take))
    async with asyncio.timeout(PATIENCE_S):
        await enough.wait()
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    count = len(sink.data)
    enough.clear()
    more = Sink(count)

    def take_more(offset: int, data: bytes) -> int:
        more.take(offset, data)
        if len(more.data) >= 100_000:
            enough.set()
        return more.delivered()

    again = asyncio.create_task(guest.follow_output("c:", 1, more.delivered, take_more))
    async with asyncio.timeout(PATIENCE_S):
        await enough.wait()
    again.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await again
    said = bytes(sink.data) + bytes(more.data)
    lines = said[: said.rindex(b"\n")].split(b"\n")
    assert [int(line) for line in lines] == list(range(len(lines)))
    await remove(guest, "c")


async def test_a_paused_container_is_killed_all_the_same_once_it_goes_on(guest, rootfs, program):
    await run(guest, rootfs, "c", program("wait"))
    await guest.containers.pause("c")
    await guest.containers.pause("c")
    await guest.containers.resume("c")
    stats = await guest.containers.stats("c")
    assert stats.pids_current >= 1
    await guest.signal_process("c:", 9)
    assert await exit_of(guest, "c:") == 137
    await remove(guest, "c")


async def test_a_terminal_is_one_stream_with_a_size(guest, rootfs, program):
    await run(guest, rootfs, "c", program("say", "hello"), terminal=True)
    assert (await output(guest, "c:")).replace(b"\r", b"") == b"hello\n"
    await run(guest, rootfs, "d", program("wait"))
    with pytest.raises(IllegalMove):
        await guest.resize_terminal("d:", columns=80, rows=24)
    await remove(guest, "c", "d")


async def test_two_containers_share_nothing_that_is_asked_for_by_id(guest, rootfs, program):
    await run(guest, rootfs, "c", program("say", "one"))
    await run(guest, rootfs, "d", program("say", "two"))
    assert (await output(guest, "c:"), await output(guest, "d:")) == (b"one\n", b"two\n")
    listed = {one.process_id for one in await guest.list_processes()}
    assert listed == {"c:", "d:"}
    await remove(guest, "c")
    assert {one.process_id for one in await guest.list_processes()} == {"d:"}
    await remove(guest, "d")
