"""ttrpc.aio.eager: the first step runs at once, and everything that asks for the current task is content."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from ttrpc.aio import eager
from ttrpc.aio.eager import FirstStep, start_eagerly

variable = contextvars.ContextVar("variable", default=0)
ONLY_OURS = pytest.mark.skipif(eager.HAS_EAGER_START, reason="optional: asyncio does it itself from 3.12 on")


async def started(make: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None] | None:
    """Start it where the loop calls back, as a connection does."""
    done: asyncio.Future[asyncio.Task[None] | None] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: done.set_result(start_eagerly(loop, make())))
    return await done


async def test_what_never_waits_is_done_without_a_task() -> None:
    ran = []

    async def work() -> None:
        variable.set(1)
        ran.append(asyncio.current_task() is not None)

    assert await started(work) is None
    assert (ran, variable.get()) == ([True], 0)


async def test_what_waits_goes_on_as_a_task_in_the_same_context() -> None:
    log: list[Any] = []
    gate = asyncio.Event()

    async def work() -> None:
        variable.set(5)
        log.append("before")
        await gate.wait()
        await asyncio.sleep(0)
        log.append(variable.get())

    task = await started(work)
    assert task is not None
    assert log == ["before"]
    gate.set()
    await task
    assert log == ["before", 5]


async def test_exceptions_of_what_is_awaited_reach_the_coroutine() -> None:
    log: list[str] = []
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        try:
            await future
        except ValueError as error:
            log.append(str(error))
        await asyncio.sleep(0)

    task = await started(work)
    future.set_exception(ValueError("from the future"))
    assert task is not None
    await task
    assert log == ["from the future"]


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_cancelling_cancels_what_is_awaited_and_is_seen_by_the_coroutine(turns: int) -> None:
    log: list[str] = []

    async def inner() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            log.append("inner")

    async def work() -> None:
        try:
            await asyncio.create_task(inner())
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            log.append("outer")

    done: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    def start() -> None:
        task = start_eagerly(asyncio.get_running_loop(), work())
        assert task is not None
        if turns == 0:
            task.cancel()
        done.set_result(task)

    asyncio.get_running_loop().call_soon(start)
    task = await done
    for _ in range(turns):
        await asyncio.sleep(0)
    if turns:
        task.cancel()
    await task
    assert log[-1] == "outer"


async def test_a_bare_yield_may_be_cancelled_too() -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            log.append("cancelled")

    done: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    def start() -> None:
        task = start_eagerly(asyncio.get_running_loop(), work())
        assert task is not None
        task.cancel()
        done.set_result(task)

    asyncio.get_running_loop().call_soon(start)
    await (await done)
    assert log == ["cancelled"]


async def test_a_timeout_and_a_task_group_entered_in_the_first_step_work() -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            log.append("timeout")

    async def fails() -> None:
        raise ValueError("x")

    async def grouped() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                await asyncio.Event().wait()
        except* ValueError:
            log.append("group")

    for make in (work, grouped):
        task = await started(make)
        assert task is not None
        await task
    assert log == ["timeout", "group"]


@ONLY_OURS
async def test_cancelling_oneself_in_the_first_step_takes_effect_at_the_first_wait() -> None:
    log: list[Any] = []

    async def work() -> None:
        me: Any = asyncio.current_task()
        assert isinstance(me, FirstStep)
        log.append((me.done(), me.cancelled(), me.get_name(), me.remove_done_callback(print), me.uncancel()))
        me.cancel("by myself")
        log.append(me.cancelling())
        with pytest.raises(RuntimeError, match="no task before it first waits"):
            me.add_done_callback(print)
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError as error:
            log.append((error.args, me.cancelling(), me.uncancel(), me.get_name().startswith("Task-")))
            me.add_done_callback(log.append)
            me.remove_done_callback(log.append)
        log.append((me.get_loop() is asyncio.get_running_loop(), me.get_coro() is not None))
        me.cancel()
        await asyncio.sleep(1)

    task = await started(work)
    assert task is not None
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == [(False, False, "ttrpc call", 0, 0), 1, (("by myself",), 1, 0, True), (True, True)]


@ONLY_OURS
async def test_a_task_that_is_dropped_closes_the_coroutine() -> None:
    log: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            log.append("closed")

    coro = work()
    awaited = coro.send(None)
    rest = eager._rest(coro, awaited)
    next(rest)
    rest.close()
    assert log == ["closed"]
