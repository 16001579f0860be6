"""The contract's limits (section 5), those that can be waited for."""

from __future__ import annotations

import asyncio

from google.protobuf import any_pb2

import ttrpc
from sandshift.conformance.answers import OK, Answer, Skipped, ask, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.saved_state import payload_of, repacked
from sandshift.conformance.scene import Scene
from sandshift.conformance.shim import phase_of, phases
from sandshift.conformance.side import Side

WAITED_FOR_S = 15.0
SUBSCRIBERS = 64
CONTAINERS = 128
DISKS = 128
"""The contract's defaults."""
DISK_BYTES = 4096


def limit(scene: Scene, name: str) -> float:
    """A limit that this target has, if it is short enough to be waited for."""
    value = scene.target.limits.get(name)
    if value is None or value > WAITED_FOR_S:
        raise Skipped(f"the limit {name} is not short enough to be waited for (--limit {name}=SECONDS)")
    return value


@case("limit: a socket that never comes is DEADLINE_EXCEEDED and Failed", "5")
async def socket_wait(scene: Scene) -> None:
    await scene.export()
    require(await scene.src.transfer(scene.session, wait_s=0.2), "DEADLINE_EXCEEDED", what="TransferSandbox")
    hold(await scene.src.state() == "Failed", "the session is not Failed")


@case("limit: a socket that comes in time is not a timeout", "5")
async def socket_in_time(scene: Scene) -> None:
    await scene.prepared()
    calling = scene.begin(scene.src.transfer(scene.session, wait_s=1.0))
    await scene.wait_for(Side.SOURCE, "SocketWaiting")
    for side in Side:
        await scene.give_socket(side, flowing=True)
    require(await calling, OK, what="TransferSandbox whose socket came while it waited")


@case("limit: a transfer beyond its deadline is cancelled with DEADLINE_EXCEEDED", "5")
async def deadline(scene: Scene) -> None:
    await scene.connected(flowing=False)
    answer = await scene.src.transfer(scene.session, deadline_s=0.5)
    require(answer, "DEADLINE_EXCEEDED", what="TransferSandbox with a deadline of 0.5 s")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")
    heard = await scene.src.told(scene.session, "FAILED")
    hold(phase_of(heard[-1]) == ("FAILED", "CANCELLED"), f"the SRC told {phases(heard)}")


@case("limit: a transfer that moves no byte is cancelled with DEADLINE_EXCEEDED", "5")
async def stall(scene: Scene) -> None:
    bound_s = limit(scene, "stall_s")
    await scene.connected(flowing=False)
    answer = await scene.src.transfer(scene.session, within_s=bound_s * 3 + 5)
    require(answer, "DEADLINE_EXCEEDED", what="TransferSandbox over a channel that takes nothing")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


@case("limit: a session that nobody asks for ends by itself", "5")
async def orphan(scene: Scene) -> None:
    bound_s = limit(scene, "orphan_s")
    await scene.export()
    await scene.wait_for(Side.SOURCE, "Idle", within_s=bound_s + 5)
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


@case("limit: one subscriber too many is RESOURCE_EXHAUSTED", "5")
async def subscribers(scene: Scene) -> None:
    most = int(scene.target.limits.get("subscribers_max", SUBSCRIBERS))
    await scene.export()
    listener = await scene.another(Side.SOURCE)
    streams = [listener.subscribe(scene.session) for _each in range(most)]
    await listener.status()
    require(await scene.src.listens(scene.session), "RESOURCE_EXHAUSTED", what=f"subscriber {most + 1}")
    for stream in streams:
        stream.cancel()
    await (
        listener.close()
    )  # ttrpc tells a server that a stream is not read any more by the end of the connection alone
    require(await _until_listened_to(scene), OK, what="a subscriber after others have gone")


async def _until_listened_to(scene: Scene) -> Answer:
    answer = Answer("")
    for _try in range(50):
        if (answer := await scene.src.listens(scene.session)).code == OK:
            return answer
        await asyncio.sleep(0.02)
    return answer


@case("limit: a message above 4 MiB is RESOURCE_EXHAUSTED and harms nothing", "5")
async def message_size(scene: Scene) -> None:
    await scene.export()
    config = any_pb2.Any(type_url=scene.config.type_url, value=bytes(5 << 20))
    answer = await ask(_import(scene, config))
    require(answer, "RESOURCE_EXHAUSTED", what="a request of 5 MiB")
    hold(await scene.dst.state() == "Idle", "the shim does not answer any more")


@case("limit: one container too many is RESOURCE_EXHAUSTED", "5")
async def containers(scene: Scene) -> None:
    most = int(scene.target.limits.get("containers_max", CONTAINERS))
    await scene.export()
    payload = payload_of(scene.config)
    for number in range(most + 1):
        payload.sandbox.containers.add(guest_id=f"c{number}", container_id=f"c{number}")
    answer = await scene.dst.import_(scene.session, repacked(scene.config, payload))
    require(answer, "RESOURCE_EXHAUSTED", what=f"a saved state with {most + 1} containers")


@case("limit: one disk too many is RESOURCE_EXHAUSTED", "5")
async def disks(scene: Scene) -> None:
    most = int(scene.target.limits.get("disks_max", DISKS))
    await scene.export()
    payload = payload_of(scene.config)
    for number in range(most + 1):
        payload.machine.devices.add(
            id=f"more{number}",
            driver="scsi-hd",
            bus="scsi0.0",
            address=f"0:{number + 1}",
            read_only=True,
            size_bytes=DISK_BYTES,
        )
    answer = await scene.dst.import_(scene.session, repacked(scene.config, payload))
    require(answer, "RESOURCE_EXHAUSTED", what=f"a saved state with more than {most} disks")
    hold(await scene.dst.state() == "Idle", "a refused import left a session behind")


@case("limit: a session whose memory is complete is not ended for want of calls", "5")
async def orphan_after_completion(scene: Scene) -> None:
    """From there on only the right to run decides: nobody but an orchestrator knows where the guest is wanted."""
    bound_s = limit(scene, "orphan_s")
    await scene.transferred()
    states = [await scene.shims[side].state() for side in Side]
    await asyncio.sleep(bound_s * 1.5 + 1)
    now = [await scene.shims[side].state() for side in Side]
    hold(now == states, f"nobody called for {bound_s * 1.5 + 1:g} s, and {states} became {now}")


async def _import(scene: Scene, config: any_pb2.Any) -> object:
    answer = await scene.dst.import_(scene.session, config)
    if answer.code != OK:
        raise ttrpc.StatusError(ttrpc.Code[answer.code], answer.message)
    return answer.response
