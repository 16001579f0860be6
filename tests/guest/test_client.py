"""The client of the agent: what it does while the guest stands still, moves, dies, or its link is cut."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from sandshift.errors import Unavailable
from sandshift.guest.client import Guest
from tests.agent.house import House, Sink, agent_house

NUMBERS = ["sh", "-c", "i=0; while [ $i -lt 60000 ]; do echo line $i; i=$((i+1)); done"]
NUMBERS_SHA256 = hashlib.sha256(b"".join(b"line %d\n" % number for number in range(60_000))).hexdigest()


@pytest.fixture
async def house(tmp_path):
    async with agent_house(tmp_path) as made:
        yield made


async def test_nobody_at_the_socket_is_said_at_once(tmp_path):
    with pytest.raises(
        Unavailable, match=r"the agent's socket .*nothing cannot be connected to: No such file"
    ):
        await Guest.connect(tmp_path / "nothing")


async def test_a_call_waits_until_the_vcpus_run(house: House):
    house.port.running.clear()
    async with house.guest() as guest:
        asking = asyncio.create_task(guest.info())
        done, _ = await asyncio.wait([asking], timeout=0.2)
        assert not done
        assert not guest.is_open
        house.port.running.set()
        assert (await asking).agent_version == "0.1.0"
        assert guest.is_open


async def test_an_agent_that_does_not_answer_is_named_with_the_bound(house: House):
    house.port.running.clear()
    async with house.guest(reply_s=0.2) as guest:
        with pytest.raises(
            Unavailable, match=r"the guest's agent at .*/agent did not answer Info within 0.2 s"
        ):
            await guest.info()
    house.port.running.set()


async def test_a_vm_that_dies_ends_every_call(house: House):
    async with house.guest() as guest:
        await guest.start_process("p", ["sleep", "60"])
        waiting = asyncio.create_task(guest.wait_process("p"))
        await guest.info()
        await house.port.close()
        with pytest.raises(
            Unavailable, match=r"the connection to the guest's agent at .* is over \(WaitProcess\)"
        ):
            await waiting


async def test_the_next_shim_goes_on_where_the_one_before_was_killed(house: House):
    async with house.guest() as first:
        await first.start_process("p", ["sh", "-c", "echo one; read x; echo $x; exit 5"], stdin=True)
        await first.write_input("p", 0, b"two\n")
        first._link.abort()  # killed: nothing is said, nothing acknowledged
        async with house.guest() as second:
            sink = Sink()
            await second.follow_output("p", 1, sink.delivered, sink.take)
            assert sink.data == b"one\ntwo\n"
            assert (await second.wait_process("p")).code == 5
            assert (
                await second.start_process("p", ["sh", "-c", "echo one; read x; echo $x; exit 5"], stdin=True)
                > 0
            )


async def test_a_cut_link_loses_and_repeats_nothing(house: House):
    async with house.guest() as guest:
        await guest.start_process("p", NUMBERS)
        sink = Sink()
        following = asyncio.create_task(guest.follow_output("p", 1, sink.delivered, sink.take))
        for mark in (50_000, 200_000, 400_000):
            while len(sink.data) < mark:
                await asyncio.sleep(0.002)
            await house.port.cut()
        await following
        assert hashlib.sha256(sink.data).hexdigest() == NUMBERS_SHA256
        assert (await guest.wait_process("p")).code == 0


async def test_a_move_in_the_middle_of_output_loses_and_repeats_nothing(house: House):
    """As the shims do it: the source freezes its sink and goes; the destination starts at the source's offset."""
    source_sink = Sink()
    async with house.guest() as source:
        await source.start_process("p", NUMBERS)
        following = asyncio.create_task(source.follow_output("p", 1, source_sink.delivered, source_sink.take))
        while len(source_sink.data) < 100_000:
            await asyncio.sleep(0.002)
        source_sink.frozen = True
        handed_over = source_sink.delivered()
        await source.info()
        following.cancel()
    async with house.guest() as destination:
        sink = Sink(base=handed_over)
        await destination.follow_output("p", 1, sink.delivered, sink.take)
    assert hashlib.sha256(source_sink.data + sink.data).hexdigest() == NUMBERS_SHA256


async def test_a_sink_that_was_frozen_and_thaws_goes_on(house: House):
    async with house.guest() as guest:
        await guest.start_process("p", NUMBERS)
        sink = Sink()
        following = asyncio.create_task(guest.follow_output("p", 1, sink.delivered, sink.take))
        while len(sink.data) < 10_000:
            await asyncio.sleep(0.002)
        sink.frozen = True
        held = sink.delivered()
        await guest.info()
        assert sink.delivered() == held
        sink.frozen = False
        await following
        assert hashlib.sha256(sink.data).hexdigest() == NUMBERS_SHA256


async def test_a_sink_that_fails_ends_the_following_and_the_agent_keeps_the_bytes(house: House):
    async with house.guest() as guest:
        await guest.start_process("p", ["echo", "precious"])

        def full(offset: int, data: bytes) -> int:
            raise Unavailable("no space")

        with pytest.raises(Unavailable, match="no space"):
            await guest.follow_output("p", 1, lambda: 0, full)
        sink = Sink()
        await guest.follow_output("p", 1, sink.delivered, sink.take)
        assert sink.data == b"precious\n"


async def test_many_processes_are_waited_for_at_once(house: House):
    async with house.guest() as guest:
        names = [f"p{number}" for number in range(60)]
        for number, name in enumerate(names):
            await guest.start_process(name, ["sh", "-c", f"exit {number}"])
        ends = await asyncio.gather(*(guest.wait_process(name) for name in names))
        assert [end.code for end in ends] == list(range(60))
