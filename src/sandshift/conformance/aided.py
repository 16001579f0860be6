"""What the contract says of guests that end themselves, write without end or fall silent: the target has to help with it.

A target that cannot is skipped, with the reason. Beside each stands the part of the contract that it is about.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from sandshift.conformance.answers import FP, OK, Skipped, hold, require
from sandshift.conformance.bounds import limit
from sandshift.conformance.cases import case
from sandshift.conformance.promises_moving import PROGRESS_MAX
from sandshift.conformance.scene import Scene
from sandshift.conformance.shim import RESUME, STOP, phase_of, phases
from sandshift.conformance.side import Side
from sandshift.conformance.target import GuestDoes
from sandshift.wire.migration import messages_pb2 as m
from sandshift.wire.migration import options_pb2 as o

UNAVAILABLE: Final = "UNAVAILABLE"
ENDED_S: Final = 60.0
"""How long a guest that was told to end itself may take."""
PROGRESS_PER_SECOND_MAX: Final = 4
LIVE_S: Final = 30.0
LIVE_PASSES: Final = 12
RECORD_S: Final = 60.0
"""The newest 64 of at most 4 in a second, and some more, take 18 s and more; a busy machine makes fewer passes."""
SECOND_NS: Final = 950_000_000
"""A second, less what the stamps of two notifications may be off."""
SLACK_S: Final = 2.0
MANY_PASSES: Final = 1_000_000


# 1. What must not move


@case("export of a sandbox whose annotation forbids it is refused", "4.1", moves=True)
async def forbidden(scene: Scene) -> None:
    await scene.pinned()
    require(await scene.src.export(scene.session), FP, what="PrepareAndExportSandbox of what must not move")
    hold(await scene.src.state() == "Idle", "a refused export left a session behind")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


# 7 and 9. A guest that ends itself


def _endless() -> o.InitializeOptions:
    """With a guest that writes neither passes nor a blackout come to an end."""
    options = o.InitializeOptions(memory_transport=o.MEMORY_TRANSPORT_TCP)
    throttle = options.memory_transfer_throttle_params
    throttle.skip_throttling = True
    throttle.target_blackout_transfer_time = 1
    throttle.target_number_of_brownout_transfer_passes = MANY_PASSES
    throttle.maximum_number_of_brownout_transfer_passes = MANY_PASSES
    return options


async def _guest_ends(scene: Scene, does: GuestDoes) -> None:
    await scene.target.guest(does)
    # Else what passes before the guest has ended may be all of it, and it stands still.
    scene.options = _endless()
    await scene.connected(flowing=False)
    calling = scene.begin(scene.src.transfer(scene.session, within_s=ENDED_S))
    await scene.drip_until_transferring(Side.DESTINATION)
    receiving = scene.begin(scene.dst.transfer(scene.session, within_s=ENDED_S))
    require(await calling, "ABORTED", what=f"TransferSandbox on the SRC, whose guest did {does.value}")
    assert scene.relay is not None
    scene.relay.flow()
    require(await receiving, UNAVAILABLE, OK, what="TransferSandbox on the DST")
    source = phases(await scene.src.told(scene.session, "FAILED"))
    hold(source[-1] == ("FAILED", "GUEST_INITIATED_CANCELLATION"), f"the SRC told {source}")
    destination = phases(await scene.dst.told(scene.session, "DONE"))
    hold(destination[-1] == ("DONE", "SOURCE_FAILED"), f"the DST told {destination}")
    answer = await scene.dst.finalize(scene.session, RESUME)
    require(answer, FP, what="RESUME on the DST of a guest that has ended")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")
    states = {(await shim.status()).vm_state for shim in scene.shims.values()}
    hold("running" not in states, f"the VMs are {states}: the guest had ended")


@case("a guest that reboots while it moves ends the transfer", "4.9", moves=True)
async def guest_reboots(scene: Scene) -> None:
    await _guest_ends(scene, GuestDoes.REBOOT)


@case("a guest that powers itself off while it moves ends the transfer", "4.7", moves=True)
async def guest_powers_off(scene: Scene) -> None:
    await _guest_ends(scene, GuestDoes.POWER_OFF)


# 8. Progress of a transfer that does not end


async def _never_ending(scene: Scene) -> None:
    """A transfer that goes on until it is cancelled."""
    await scene.target.guest(GuestDoes.WRITE)
    scene.options = _endless()
    await scene.connected(flowing=True)
    scene.begin(scene.src.transfer(scene.session))
    await scene.wait_for(Side.SOURCE, "Transferring")


async def _listen(scene: Scene, for_s: float, passes: int = 0) -> list[m.NotificationsResponse]:
    """What one subscriber hears in this time, as it comes, or until it has heard of so many passes; then the transfer is
    cancelled.
    """
    heard: list[m.NotificationsResponse] = []

    async def listen() -> None:
        async for response in scene.src.subscribe(scene.session):
            heard.append(response)
            if passes and len({_pass(one) for one in _progress(heard)}) >= passes:
                enough.set()

    enough, listening = asyncio.Event(), asyncio.create_task(listen())
    waiting = asyncio.create_task(enough.wait())
    await asyncio.wait([listening, waiting], timeout=for_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    hold(not listening.done(), f"the notifications ended by themselves: {phases(heard)}")
    hold(await scene.src.state() == "Transferring", "the transfer ended though its guest writes without end")
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    await scene.src.told(scene.session, "FAILED")
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    return heard


def _pass(response: m.NotificationsResponse) -> int:
    number: int = getattr(response.notification.progress, "pass")
    return number


def _stamp_ns(response: m.NotificationsResponse) -> int:
    return response.update_time.ToNanoseconds()


def _progress(heard: list[m.NotificationsResponse]) -> list[m.NotificationsResponse]:
    return [one for one in heard if one.notification.HasField("progress")]


@case("notifications tell progress at most four times in a second", "4.8", moves=True)
async def live_progress(scene: Scene) -> None:
    await _never_ending(scene)
    told = _progress(await _listen(scene, LIVE_S, passes=LIVE_PASSES))
    hold(len(told) > PROGRESS_PER_SECOND_MAX, f"only {len(told)} times progress in {LIVE_S:g} s of passes")
    stamps = sorted(_stamp_ns(one) for one in told)
    for first, fifth in zip(stamps, stamps[PROGRESS_PER_SECOND_MAX:], strict=False):
        hold(
            fifth - first >= SECOND_NS, f"progress was told five times within {(fifth - first) / 1e6:.0f} ms"
        )


@case("notifications keep the newest 64 of progress, and every phase", "4.8", moves=True)
async def kept_progress(scene: Scene) -> None:
    await _never_ending(scene)
    heard = await _listen(scene, RECORD_S, passes=PROGRESS_MAX + 6)
    record = await scene.src.told(scene.session, "FAILED")
    ended_ns, last_ns = (_stamp_ns(one) for one in (record[-1], _progress(record)[-1]))
    hold(
        ended_ns - last_ns < 2e9,
        f"the newest progress is {(ended_ns - last_ns) / 1e9:.1f} s older than the end",
    )
    passes = {_pass(one): one.message_id for one in _progress(heard)}
    kept = [one.message_id for one in _progress(record)]
    if len(passes) <= PROGRESS_MAX:
        raise Skipped(f"only {len(passes)} passes in {RECORD_S:g} s: too few to see which are kept")
    hold(len(kept) <= PROGRESS_MAX, f"{len(kept)} of progress are kept")
    missing = {*list(passes.values())[-PROGRESS_MAX // 2 :]} - {*kept}
    hold(not missing, f"of the newest passes' progress the record does not have {sorted(missing)}")
    hold(phase_of(record[0])[0] == "SETUP_DONE", f"the record begins with {phase_of(record[0])}")


# Limits (5): a VM, a guest's agent or a peer that does not answer


@case("limit: a VM that does not answer is UNAVAILABLE, by name", "5")
async def silent_vm(scene: Scene) -> None:
    bound_s = limit(scene, "qmp_command_s")
    async with scene.target.silent(Side.SOURCE):
        began_s = time.monotonic()
        answer = await scene.src.export(scene.session)
        took_s = time.monotonic() - began_s
    what = "PrepareAndExportSandbox with a VM that is silent"
    require(answer, UNAVAILABLE, what=what, names=(f"{bound_s:g} s",))
    hold(took_s < bound_s + SLACK_S, f"it took {took_s:.1f} s, the limit is {bound_s:g} s")
    hold(await scene.src.state() == "Idle", "a refused export left a session behind")


@case("limit: a guest's agent that does not answer is UNAVAILABLE, by name", "5")
async def silent_agent(scene: Scene) -> None:
    bound_s = limit(scene, "agent_reply_s")
    async with scene.target.silent(Side.SOURCE):
        began_s = time.monotonic()
        answer = await scene.src.run_process(f"silent-{scene.session[-12:]}")
        took_s = time.monotonic() - began_s
    what = "RunProcess with a guest that is silent"
    require(answer, UNAVAILABLE, what=what, names=(f"{bound_s:g} s",))
    hold(took_s < bound_s + SLACK_S, f"it took {took_s:.1f} s, the limit is {bound_s:g} s")


@case("limit: a Cancel whose outcome does not come is UNAVAILABLE and can be repeated", "5")
async def slow_cancel(scene: Scene) -> None:
    bound_s = limit(scene, "cancel_s")
    await scene.reach("Transferring", Side.SOURCE)
    async with scene.target.silent(Side.SOURCE):
        began_s = time.monotonic()
        answer = await scene.src.cancel(scene.session)
        took_s = time.monotonic() - began_s
    require(answer, UNAVAILABLE, what="Cancel of a VM that is silent")
    hold(took_s < bound_s + SLACK_S, f"it took {took_s:.1f} s, the limit is {bound_s:g} s")
    for _try in range(3):
        if (answer := await scene.src.cancel(scene.session)).code == OK:
            break
    require(answer, OK, what="the same Cancel once the VM answers again")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


@case("limit: a peer that does not answer is UNAVAILABLE, and nothing is lost", "5", moves=True)
async def silent_peer(scene: Scene) -> None:
    bound_s = limit(scene, "handover_frame_s")
    await scene.transferred()
    assert scene.relay is not None
    scene.relay.hold()
    began_s = time.monotonic()
    answer = await scene.dst.finalize(scene.session, RESUME)
    took_s = time.monotonic() - began_s
    require(answer, UNAVAILABLE, what="RESUME on the DST while no frame of the SRC comes")
    hold(took_s < 2 * bound_s + SLACK_S, f"it took {took_s:.1f} s, the limit is {bound_s:g} s a try")
    hold((await scene.dst.status()).vm_state != "running", "the DST runs without the SRC's word")
    scene.relay.flow()
    require(await scene.dst.finalize(scene.session, RESUME), OK, what="RESUME once frames come again")
    require(await scene.src.finalize(scene.session, STOP), OK, what="STOP on the SRC")
