"""The contract's promises 1 to 6 (section 4): how a session begins. One case each, or several."""

from __future__ import annotations

import socket
from typing import Final

from google.protobuf import any_pb2

from sandshift.conformance.answers import FP, IA, OK, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.relay import descriptor_of, tcp_pair
from sandshift.conformance.saved_state import altered, payload_of, repacked
from sandshift.conformance.scene import Scene
from sandshift.wire.sandshift import state_pb2

WSAPROTOCOL_INFO_BYTES: Final = 628


# 1. PrepareAndExportSandbox


@case("export of a sandbox that cannot move is refused at once and changes nothing", "4.1")
async def export_refused(scene: Scene) -> None:
    """The destination's shim awaits a sandbox: it has none that could move."""
    answer = await scene.dst.export(scene.session)
    require(answer, FP, what="PrepareAndExportSandbox without a running sandbox")
    hold(await scene.dst.state() == "Idle", "a refused export left a session behind")
    require(await scene.dst.export(scene.session), FP, what="the same again")


# 2. Saved state


@case("a saved state that was damaged is DATA_LOSS", "4.2")
async def damaged_state(scene: Scene) -> None:
    await scene.export()
    envelope = state_pb2.SavedState.FromString(scene.config.value)
    middle = len(envelope.payload) // 2
    flipped = (
        envelope.payload[:middle] + bytes([envelope.payload[middle] ^ 1]) + envelope.payload[middle + 1 :]
    )
    for config in (altered(scene.config, payload=flipped), altered(scene.config, sha256=bytes(32))):
        require(await scene.dst.import_(scene.session, config), "DATA_LOSS", what="ImportSandbox, damaged")
    hold(await scene.dst.state() == "Idle", "a refused import left a session behind")


@case("a saved state of a version that is not read is refused with both ranges", "4.2")
async def other_version(scene: Scene) -> None:
    await scene.export()
    newer = altered(scene.config, schema_version=999, min_reader_version=998)
    require(
        await scene.dst.import_(scene.session, newer),
        FP,
        what="a state from the future",
        names=("999", "998"),
    )


@case("a saved state of a version that old readers may read is read", "4.2")
async def tolerated_version(scene: Scene) -> None:
    await scene.export()
    newer = altered(scene.config, schema_version=999, min_reader_version=1)
    require(
        await scene.dst.import_(scene.session, newer), OK, what="a newer state that readers of 1 may read"
    )


@case("a saved state of another make is refused", "4.2")
async def foreign_state(scene: Scene) -> None:
    await scene.export()
    foreign = any_pb2.Any(type_url="type.microsoft.com/hcsshim.controller.vm.save.v1.Payload", value=b"x")
    require(await scene.dst.import_(scene.session, foreign), IA, what="ImportSandbox, not ours")


# 3. ImportSandbox


@case("import creates nothing on the host", "4.3")
async def import_creates_nothing(scene: Scene) -> None:
    await scene.imported()
    status = await scene.dst.status()
    hold(status.vm_state == "absent" and not status.qemu_pid, f"there is a VM: {status.vm_state}")


@case("import of duplicate container ids is refused", "4.3")
async def duplicate_containers(scene: Scene) -> None:
    await scene.export()
    payload = payload_of(scene.config)
    for _twice in range(2):
        payload.sandbox.containers.add(guest_id="c", container_id="c")
    require(
        await scene.dst.import_(scene.session, repacked(scene.config, payload)), IA, what="a container twice"
    )


@case("import with another sandbox_id than the shim's is refused", "4.3")
async def other_sandbox(scene: Scene) -> None:
    await scene.export()
    answer = await scene.dst.import_(scene.session, scene.config, "another-sandbox")
    require(answer, IA, what="another sandbox_id", names=("another-sandbox", scene.dst.sandbox_id))


@case("import of another session's state is refused", "4.3")
async def other_sessions_state(scene: Scene) -> None:
    await scene.export()
    require(await scene.dst.import_("another-session", scene.config), IA, what="another session's state")


# 5. PrepareSandbox


@case("prepare names every blocker, changes nothing, and can be tried again", "4.5")
async def blockers(scene: Scene) -> None:
    await scene.export()
    payload = payload_of(scene.config)
    payload.machine.machine_type = "pc-q35-99.9"
    payload.machine.memory_bytes = 1 << 60
    require(await scene.dst.import_(scene.session, repacked(scene.config, payload)), OK, what="ImportSandbox")
    for _twice in range(2):
        answer = await scene.dst.prepare(scene.session)
        require(answer, FP, what="PrepareSandbox of what cannot run here", names=("pc-q35-99.9", "memory"))
        hold(await scene.dst.state() == "DestinationImported", "a refused PrepareSandbox changed the state")
    hold((await scene.dst.status()).vm_state == "absent", "a refused PrepareSandbox left a VM behind")


# 6. CreateDuplicateSocket


@case("a socket other than the one described is refused and harms nothing", "4.6")
async def wrong_sockets(scene: Scene) -> None:
    await scene.export()
    end, other = tcp_pair()
    with end, other:
        lies = {
            "cookie": descriptor_of(end, so_cookie=1),
            "family": descriptor_of(end, family=int(socket.AF_INET6)),
            "type": descriptor_of(end, type=int(socket.SOCK_DGRAM)),
            "protocol": descriptor_of(end, protocol=17),
            "version": descriptor_of(end, version=2),
            "fd": descriptor_of(end, fd=other.fileno()),
            "closed fd": descriptor_of(end, fd=1 << 20),
            "a process that is not": descriptor_of(end, pid=1 << 22),
            "nothing": b"",
            "WSAPROTOCOL_INFO": bytes(range(256)) * 2 + bytes(WSAPROTOCOL_INFO_BYTES - 512),
        }
        for lie, protocol_info in lies.items():
            answer = await scene.src.give_socket(scene.session, protocol_info)
            require(answer, IA, what=f"CreateDuplicateSocket with a wrong {lie}")
        hold(await scene.src.state() == "SourceExported", "a refused socket changed the state")
        require(
            await scene.src.give_socket(scene.session, descriptor_of(end)),
            OK,
            what="the right one afterwards",
        )


@case("a socket that is not connected is refused", "4.6")
async def unconnected(scene: Scene) -> None:
    await scene.export()
    with socket.socket() as end:
        require(
            await scene.src.give_socket(scene.session, descriptor_of(end)), FP, what="an unconnected socket"
        )
    hold(await scene.src.state() == "SourceExported", "a refused socket changed the state")


@case("a datagram socket is refused", "4.6")
async def datagrams(scene: Scene) -> None:
    await scene.export()
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        described = descriptor_of(one, type=int(socket.SOCK_STREAM))
        require(await scene.src.give_socket(scene.session, described), IA, what="a datagram socket")
