"""What is measured, for any Python client: a way to echo 64 bytes and a way to read a stream of messages."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

WARM_S = 0.1
TIMEOUT_S = 30.0
"""Every unary call of every peer carries this deadline."""
SEQUENTIAL, CONCURRENT, STREAM, STREAM_BIG = "sequential", "concurrent64", "stream64", "stream64k"
KINDS = (SEQUENTIAL, CONCURRENT, STREAM, STREAM_BIG)

Echo = Callable[[], Awaitable[Any]]
Stream = Callable[[int, int], AsyncIterator[Any]]
"""(messages, bytes of each) -> the messages."""


async def measure(kind: str, seconds: float, echo: Echo, stream: Stream) -> None:
    """Measure one kind and print it as one JSON object."""
    if kind == SEQUENTIAL:
        result = await sequential(seconds, echo)
    elif kind == CONCURRENT:
        result = await concurrent(seconds, echo)
    else:
        size, messages = (64, 20000) if kind == STREAM else (64 << 10, 500)
        result = await streaming(seconds, stream, messages, size)
    json.dump(result, sys.stdout)


async def sequential(seconds: float, echo: Echo) -> dict[str, float]:
    took: list[float] = []
    clock = time.perf_counter
    warm = clock() + WARM_S
    end = warm + seconds
    while True:
        start = clock()
        await echo()
        if start > end:
            break
        if start > warm:
            took.append(clock() - start)
    took.sort()
    return {
        "p50_us": took[len(took) // 2] * 1e6,
        "p99_us": took[len(took) * 99 // 100] * 1e6,
        "per_s": len(took) / seconds,
    }


async def concurrent(seconds: float, echo: Echo, callers: int = 64) -> dict[str, float]:
    clock = time.perf_counter
    warm = clock() + WARM_S
    end = warm + seconds

    async def call() -> int:
        count = 0
        while (now := clock()) < end:
            await echo()
            count += now > warm
        return count

    return {"per_s": sum(await asyncio.gather(*(call() for _ in range(callers)))) / seconds}


async def streaming(seconds: float, stream: Stream, messages: int, size: int) -> dict[str, float]:
    clock = time.perf_counter
    warm = clock() + WARM_S
    first = 0.0
    count = 0
    while True:
        now = clock()
        if not first and now > warm:
            first, count = now, 0
        if first and now - first > seconds:
            return {"per_s": count / (now - first)}
        async for _ in stream(messages, size):
            count += 1
