"""A damaged, truncated, replayed, foreign or forged saved state: refused by the destination, and nothing of it stays."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from sandshift.config import Limits
from sandshift.session import saved
from sandshift.session.statement import Cell
from sandshift.shim.migration import books
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.sandshift import state_pb2
from tests.shim.house import TwoHosts, two_hosts

STOP, RESUME = 1, 2
IA, FP = ttrpc.Code.INVALID_ARGUMENT, ttrpc.Code.FAILED_PRECONDITION
LOST, FULL = ttrpc.Code.DATA_LOSS, ttrpc.Code.RESOURCE_EXHAUSTED
DAMAGES = 40


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[TwoHosts]:
    async with two_hosts(tmp_path, Limits(handover_frame_s=0.3)) as both:
        yield both


async def refused(hosts: TwoHosts, config: AnyMessage) -> ttrpc.StatusError:
    """The destination refuses it and is as it was; the source too, and its key is in no message."""
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.import_config(config)
    places = hosts.destination.places
    for path in (places.journal_file, books.key_file(places), books.config_file(places)):
        assert not path.exists()
    assert not (await hosts.d.status()).session.session_id
    assert hosts.runners() == ["source"]
    return told.value


async def still_moves(hosts: TwoHosts, config: AnyMessage) -> None:
    await hosts.import_config(config)
    request = m.PrepareSandboxRequest(session_id=hosts.session)
    await hosts.d.migration.prepare_sandbox(request, timeout_s=10)
    await hosts.connect()
    await hosts.transfer()
    await hosts.d.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["destination"]


async def test_a_bit_that_is_wrong_anywhere_is_found(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    places = random.Random(3).sample(range(len(config.value)), DAMAGES)
    for at in places:
        value = bytearray(config.value)
        value[at] ^= 1 << at % 8
        error = await refused(hosts, AnyMessage(type_url=config.type_url, value=bytes(value)))
        assert error.code in (LOST, FP), (at, error)
    await still_moves(hosts, config)


async def test_a_piece_of_it_is_no_saved_state(hosts: TwoHosts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sandshift")
    config = (await hosts.export()).config
    for size in (0, 1, 10, len(config.value) // 2, len(config.value) - 1):
        error = await refused(hosts, AnyMessage(type_url=config.type_url, value=config.value[:size]))
        assert error.code is LOST, (size, error)
    longer = AnyMessage(type_url=config.type_url, value=config.value + b"\xff")
    assert (await refused(hosts, longer)).code is LOST
    assert caplog.text.count("DATA_LOSS: ") == 6
    assert caplog.text.count("ImportSandbox of process") == 6
    await still_moves(hosts, config)


async def test_somebody_else_s_type_is_not_ours(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    error = await refused(hosts, AnyMessage(type_url="type.googleapis.com/other", value=config.value))
    assert error.code is IA
    assert "a saved state of sandshift has" in error.message


async def test_another_session_s_state_is_refused(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    hosts.session = "session-2"
    error = await refused(hosts, config)
    assert error.code is IA
    assert "config belongs to session 'session-1', the request names 'session-2'" in error.message


async def test_the_state_of_an_earlier_run_brings_nobody_s_memory_over(hosts: TwoHosts) -> None:
    """A destination cannot know that it is old: the key in it is, so no byte of the new run is believed."""
    old = (await hosts.export()).config
    await hosts.s.finalize(hosts.session, RESUME)
    await hosts.s.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    await hosts.export()
    await hosts.import_config(old)
    await hosts.d.migration.prepare_sandbox(m.PrepareSandboxRequest(session_id=hosts.session), timeout_s=10)
    await hosts.connect()
    request = m.TransferSandboxRequest(session_id=hosts.session)
    outcomes = await asyncio.gather(
        hosts.s.migration.transfer_sandbox(request, timeout_s=10),
        hosts.d.migration.transfer_sandbox(request, timeout_s=10),
        return_exceptions=True,
    )
    assert all(isinstance(outcome, ttrpc.StatusError) for outcome in outcomes)
    assert (await hosts.d.status()).session.cell == Cell.REFUSED.value
    with pytest.raises(ttrpc.StatusError, match="is of another run"):
        await hosts.s.finalize(hosts.session, RESUME, (await hosts.d.status()).session.receipt)
    await hosts.s.finalize(hosts.session, RESUME)
    assert hosts.runners() == ["source"]


async def test_a_state_that_came_once_is_not_taken_after_its_session(hosts: TwoHosts) -> None:
    """Carried a second time, when the guest runs on the destination: a sandbox that exists is not imported over."""
    config = (await hosts.export()).config
    await still_moves(hosts, config)
    await hosts.s.finalize(hosts.session, STOP)
    for client in (hosts.s, hosts.d):
        await client.migration.cleanup(m.CleanupRequest(session_id=hosts.session))
    with pytest.raises(
        ttrpc.StatusError, match="is ready: a sandbox is imported into a shim that has none"
    ) as told:
        await hosts.import_config(config)
    assert told.value.code is FP
    hosts.d, hosts.s = hosts.s, hosts.d
    with pytest.raises(
        ttrpc.StatusError, match="is stopped: a sandbox is imported into a shim that has none"
    ):
        await hosts.import_config(config)
    assert hosts.runners() == ["destination"]


def forged(config: AnyMessage, change: Callable[[state_pb2.SavedSandbox], object]) -> AnyMessage:
    """As somebody would who knows the format: the digest is right, the content is not the source's."""
    envelope = state_pb2.SavedState.FromString(config.value)
    payload = state_pb2.SavedSandbox.FromString(envelope.payload)
    change(payload)
    envelope.payload = payload.SerializeToString()
    envelope.sha256 = hashlib.sha256(envelope.payload).digest()
    return AnyMessage(type_url=saved.TYPE_URL, value=envelope.SerializeToString())


def a_process(process_id: str) -> Callable[[state_pb2.SavedSandbox], object]:
    return lambda state: state.sandbox.processes.add(process_id=process_id, pid=1)


def a_device(**values: str) -> Callable[[state_pb2.SavedSandbox], object]:
    return lambda state: state.machine.devices.add(**values)


def of_machine(name: str, value: object) -> Callable[[state_pb2.SavedSandbox], object]:
    return lambda state: setattr(state.machine, name, value)


def many_containers(state: state_pb2.SavedSandbox) -> None:
    for number in range(129):
        state.sandbox.containers.add(guest_id=f"c{number}", container_id=f"c{number}")


def no_key(state: state_pb2.SavedSandbox) -> None:
    state.session_key = b"short"


FORGED = {
    "a process that names a path": (a_process("../../../etc/cron.d/evil"), IA, "process id '../../../etc/"),
    "a process with no name": (a_process(""), IA, "process id is empty"),
    "a process with a name of a megabyte": (a_process("x" * (1 << 20)), IA, "at most 76 are allowed"),
    "a container that names a path": (
        lambda state: state.sandbox.containers.add(guest_id="../up", container_id="c"),
        IA,
        "guest_id '../up'",
    ),
    "a device with an option more": (
        a_device(id="x", driver="virtio-net-pci,mq=on", bus="b"),
        IA,
        "machine: device x has driver",
    ),
    "a device whose id ends an option": (a_device(id="x,y", driver="vfio-pci"), IA, "is not one that QEMU takes"),
    "another accelerator": (of_machine("accelerator", "tcg,thread=single"), IA, "is not one of tcg, kvm"),
    "more containers than may be": (many_containers, FULL, "at most 128 are allowed"),
    "a key of the wrong size": (no_key, LOST, "session key has 5 bytes, not 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_state_that_could_reach_beyond_the_sandbox_is_refused(
    hosts: TwoHosts, name: str
) -> None:
    change, code, words = FORGED[name]
    config = (await hosts.export()).config
    error = await refused(hosts, forged(config, change))
    assert (error.code, words in error.message) == (code, True), error
    await still_moves(hosts, config)


NOT_HERE = {
    "an option in the machine's type": (
        of_machine("machine_type", "pc-q35-10.0,dump-guest-core=on"),
        "has no pc-q35-10.0,dump",
    ),
    "an option in the CPU's model": (
        of_machine("cpu_model", "max,host-phys-bits=on"),
        "has no model max,host",
    ),
    "all memory there is": (of_machine("memory_bytes", 1 << 60), "this host has 8192 MiB free"),
}


@pytest.mark.parametrize("name", NOT_HERE)
async def test_a_forged_machine_is_built_by_no_host(hosts: TwoHosts, name: str) -> None:
    change, words = NOT_HERE[name]
    config = (await hosts.export()).config
    await hosts.import_config(forged(config, change))
    with pytest.raises(ttrpc.StatusError) as told:
        await hosts.d.migration.prepare_sandbox(
            m.PrepareSandboxRequest(session_id=hosts.session), timeout_s=10
        )
    assert (told.value.code, words in told.value.message) == (FP, True), told.value
    assert not hosts.destination.world.processes
    assert hosts.destination.taps.made == []


async def test_the_key_is_in_no_refusal(hosts: TwoHosts) -> None:
    config = (await hosts.export()).config
    key = saved.decode(config, expected=saved.SessionId(hosts.session)).session_key
    for change, _code, _words in FORGED.values():
        error = await refused(hosts, forged(config, change))
        assert key.hex() not in error.message
        assert key not in error.message.encode(errors="surrogateescape")
