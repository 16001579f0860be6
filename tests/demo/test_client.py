"""The client against the real workload, run natively, and against services that do it wrong."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import pytest

from sandshift.cli.demo.client import CounterClient, ask_service
from sandshift.cli.demo.proof import conversation
from sandshift.cli.demo.workload import Workload
from sandshift.errors import PeerProtocolError, TimedOut


@pytest.fixture
async def port():
    workload = Workload(working_set_mib=1, dirty_mib_per_s=1, port=0)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *workload.arguments()[1:], stdout=asyncio.subprocess.PIPE
    )
    await process.stdout.readline()
    yield json.loads(await process.stdout.readline())["port"]
    process.kill()
    await process.communicate()


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_number_comes_once_and_in_order(port):
    client = await CounterClient.connect("", "127.0.0.1", port, timeout_s=5)
    client.start()
    await until(lambda: len(client.answers) >= 20)
    await client.stop()
    assert [answer.number for answer in client.answers] == list(range(1, len(client.answers) + 1))
    assert all(answer.nonce_matched for answer in client.answers)
    assert (client.unanswered, client.failure) == (0, "")


async def test_a_cut_connection_is_written_down_as_the_failure_it_is(port):
    client = await CounterClient.connect("", "127.0.0.1", port, timeout_s=5)
    client.start()
    await until(lambda: client.answers)
    client.cut()
    await until(lambda: client.failure)
    await client.stop()
    assert not conversation(
        client.answers, moved_ns=0, unanswered=client.unanswered, failure=client.failure
    ).survived


async def test_it_goes_on_asking_while_nothing_answers():
    """A service that takes ten requests in before it answers the first."""
    asked = 0

    async def slow(reader, writer):
        nonlocal asked
        lines = []
        while len(lines) < 10:
            lines.append(await reader.readline())
            asked += 1
        for number, line in enumerate(lines, 1):
            writer.write(b"%d %s" % (number, line[2:]))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    async with server:
        client = await CounterClient.connect("", "127.0.0.1", server.sockets[0].getsockname()[1], timeout_s=5)
        started_ns = time.monotonic_ns()
        client.start()
        await until(lambda: len(client.answers) == 10)
        assert client.answers[9].asked_ns - started_ns >= 40_000_000, "a beat of 5 ms between them"
        assert client.answers[0].nonce_matched
        client.cut()
        await client.stop()


async def test_an_answer_that_nobody_asked_for_is_a_failure():
    async def noise(reader, writer):
        writer.write(b"what?\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(noise, "127.0.0.1", 0)
    async with server:
        client = await CounterClient.connect("", "127.0.0.1", server.sockets[0].getsockname()[1], timeout_s=5)
        client.start()
        await until(lambda: client.failure)
        assert "b'what?', which nobody asked for" in client.failure
        client.cut()
        await client.stop()


async def test_commands_are_answered_beside_a_conversation(port):
    answer = await ask_service("", "127.0.0.1", port, "CHECK", timeout_s=10)
    assert answer["pages_stale"] == 0
    assert (await ask_service("", "127.0.0.1", port, "STATUS", timeout_s=10))["event"] == "status"


async def test_an_unknown_command_is_not_waited_for_for_ever(port):
    with pytest.raises(TimedOut, match=r"did not answer NOTHING within 0\.05 s"):
        await ask_service("", "127.0.0.1", port, "NOTHING", timeout_s=0.05)


async def test_a_service_that_does_not_speak_json_is_named():
    async def echo(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PeerProtocolError, match=r"answered WHO with b'WHO\\n'"):
            await ask_service("", "127.0.0.1", port, "WHO", timeout_s=5)


async def test_nobody_listening_ends_with_the_bound():
    with pytest.raises(TimedOut, match=r"nobody listened on 127.0.0.1 port 1 within 0\.1 s"):
        await CounterClient.connect("", "127.0.0.1", 1, timeout_s=0.1)
