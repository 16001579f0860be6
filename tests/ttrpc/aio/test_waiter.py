"""ttrpc.aio.waiter: tasks await and cancel it as they do a Future."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from ttrpc.aio.waiter import Waiter

variable = contextvars.ContextVar("variable", default=0)


async def wait(waiter: Waiter, log: list[str]) -> None:
    variable.set(7)
    await waiter
    log.append(f"resumed {variable.get()}")


async def waiting() -> tuple[Waiter, asyncio.Task[None], list[str]]:
    log: list[str] = []
    waiter = Waiter(asyncio.get_running_loop())
    task = asyncio.create_task(wait(waiter, log))
    await asyncio.sleep(0)
    return waiter, task, log


async def test_resume_now_runs_the_task_at_once_in_its_own_context() -> None:
    waiter, task, log = await waiting()
    seen: list[list[str]] = []

    def callback() -> None:
        waiter.resume_now()
        seen.append(list(log))
        waiter.resume_now()

    asyncio.get_running_loop().call_soon(callback)
    await task
    assert (seen, variable.get()) == ([["resumed 7"]], 0)


async def test_resume_soon_runs_it_in_the_next_turn() -> None:
    waiter, task, log = await waiting()
    waiter.resume_soon()
    waiter.resume_soon()
    assert (log, waiter.done()) == ([], True)
    await task
    assert log == ["resumed 7"]


async def test_one_that_is_done_is_not_waited_for() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    waiter.resume_now()
    await waiter
    assert (waiter.result(), waiter.exception(), waiter.cancelled()) == (None, None, False)


async def test_cancelling_the_task_cancels_the_wait_with_its_message() -> None:
    waiter, task, _ = await waiting()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert waiter.cancelled()
    with pytest.raises(asyncio.CancelledError):
        waiter.result()
    with pytest.raises(asyncio.CancelledError):
        waiter.exception()
    waiter.resume_soon()
    waiter.resume_now()


async def test_a_task_that_is_cancelled_after_the_resumption_is_still_cancelled() -> None:
    waiter, task, log = await waiting()
    waiter.resume_soon()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == []


async def test_only_one_task_may_wait() -> None:
    waiter, task, _ = await waiting()
    with pytest.raises(RuntimeError, match="one task only"):
        await wait(waiter, [])
    waiter.resume_soon()
    await task


async def test_callbacks_can_be_taken_back() -> None:
    loop = asyncio.get_running_loop()
    waiter = Waiter(loop)
    called: list[Waiter] = []
    waiter.add_done_callback(called.append)
    assert waiter.get_loop() is loop
    assert (waiter.remove_done_callback(print), waiter.remove_done_callback(called.append)) == (0, 1)
    waiter.resume_now()
    assert called == []
    with pytest.raises(asyncio.InvalidStateError):
        Waiter(loop).result()


async def test_a_callback_without_a_context_is_called_as_it_is() -> None:
    waiter = Waiter(asyncio.get_running_loop())
    called: list[Waiter] = []
    waiter.add_done_callback(called.append)
    waiter.resume_now()
    assert called == [waiter]
