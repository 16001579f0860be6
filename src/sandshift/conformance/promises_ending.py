"""The contract's promises 10 to 16 (section 4): how a session ends, and what holds throughout. One case each, or several."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Final

from sandshift.conformance.answers import FP, IA, OK, Answer, Broken, Skipped, hold, require
from sandshift.conformance.cases import case
from sandshift.conformance.scene import BACK, Scene
from sandshift.conformance.shim import RESUME, STOP
from sandshift.conformance.side import Side
from sandshift.wire.migration import options_pb2 as o

TCP: Final = o.MEMORY_TRANSPORT_TCP


# 10. Cancel


@case("Cancel is done when it answers, and closes the transport", "4.10")
async def synchronous_cancel(scene: Scene) -> None:
    await scene.reach("Transferring", Side.SOURCE)
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    now = await scene.src.state()
    hold(now == "Cancelled", f"Cancel answered and the state is {now}")
    assert scene.relay is not None
    scene.relay.flow()
    try:
        async with asyncio.timeout(5):
            await scene.relay.ended[Side.SOURCE].wait()
    except TimeoutError:
        raise Broken("Cancel left the transport open while the transfer ran") from None
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")


@case("Cancel after everything has arrived wins over the move", "4.10")
async def late_cancel(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.cancel(scene.session), OK, what="Cancel on the SRC in TransferCompleted")
    require(
        await scene.dst.finalize(scene.session, RESUME), FP, what="RESUME on the DST after the SRC's Cancel"
    )
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("Cancel after Finalize is refused and changes nothing", "4.10")
async def cancel_after_finalize(scene: Scene) -> None:
    await scene.reach("Finalized", Side.SOURCE)
    require(await scene.src.cancel(scene.session), FP, what="Cancel in Finalized")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="the same Finalize again")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")


# 11. FinalizeSandbox


@case("Finalize that failed can be tried until it succeeds", "4.11", moves=True)
async def retried_finalize(scene: Scene) -> None:
    """The channel is gone: without the source's word the destination must not run; with its receipt it may."""
    await scene.transferred()
    assert scene.relay is not None
    scene.relay.cut()
    for _twice in range(2):
        require(
            await scene.dst.finalize(scene.session, RESUME), "UNAVAILABLE", what="RESUME without a channel"
        )
    ready = await scene.dst.receipt()
    require(
        await scene.src.finalize(scene.session, STOP, ready), "UNAVAILABLE", what="STOP with READY's receipt"
    )
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()), OK, what="RESUME, receipt"
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()), OK, what="STOP, receipt"
    )
    states = ((await scene.src.status()).vm_state, (await scene.dst.status()).vm_state)
    hold(states == ("stopped", "running"), f"the VMs are {states}, not stopped and running")


@case("Finalize never makes two runners", "4.11", moves=True)
async def one_runner(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.dst.finalize(scene.session, RESUME), OK, what="RESUME on the DST")
    require(await scene.src.finalize(scene.session, RESUME), FP, what="RESUME on the SRC after it")
    hold((await scene.src.status()).vm_state != "running", "both VMs run")
    require(await scene.dst.finalize(scene.session, STOP), FP, what="STOP on a DST that runs")
    require(await scene.src.finalize(scene.session, STOP), OK, what="STOP on the SRC")


@case("Finalize of the destination after the source took the guest back is refused", "4.11")
async def refused_forward(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, RESUME), FP, what="RESUME on the DST after it")
    hold((await scene.dst.status()).vm_state != "running", "both VMs run")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("Finalize without an action, or with an unknown one, is refused", "4.11")
async def no_action(scene: Scene) -> None:
    await scene.export()
    for action in (0, 3, 99):
        require(await scene.src.finalize(scene.session, action), IA, what=f"action {action}")


@case("Finalize with a receipt of another session is refused", "4.11")
async def foreign_receipt(scene: Scene) -> None:
    await scene.transferred()
    for receipt in (b"nonsense", await scene.dst.receipt()):
        require(
            await scene.dst.finalize(scene.session, RESUME, receipt),
            IA,
            what="a receipt that is not the peer's",
        )
    hold((await scene.dst.status()).vm_state != "running", "a forged receipt started the guest")


# 12. Cleanup


@case("Cleanup from Failed runs the guest on the source and discards the destination's", "4.12")
async def cleanup_from_failed(scene: Scene) -> None:
    await scene.connected(flowing=False)
    for side in Side:
        scene.begin(scene.shims[side].transfer(scene.session))
    await scene.drip_until_transferring(Side.DESTINATION)
    assert scene.relay is not None
    scene.relay.cut()
    for side in Side:
        await scene.wait_for(side, "Failed")
        require(await scene.shims[side].cleanup(scene.session), OK, what=f"Cleanup on the {side.value}")
        hold(await scene.shims[side].state() == "Idle", "Cleanup did not end the session")
    states = ((await scene.src.status()).vm_state, (await scene.dst.status()).vm_state)
    hold(states == ("running", "absent"), f"the VMs are {states}, not running and absent")
    require(await scene.src.run_process(f"p-{scene.session[-12:]}"), OK, what="RunProcess afterwards")


@case("Cleanup from Cancelled after completion runs the guest on the source", "4.12")
async def cleanup_from_cancelled(scene: Scene) -> None:
    await scene.transferred()
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup without a Finalize")
    hold((await scene.src.status()).vm_state == "running", "the guest does not run on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("what has moved away is told", "4.12", moves=True)
async def moved_away(scene: Scene) -> None:
    await scene.moved()
    answer = require(await scene.src.wait_sandbox(10), OK, what="WaitSandbox on the SRC")
    hold(answer.response.exit_status == 255, f"the SRC's exit code is {answer.response.exit_status}")
    info = (await scene.src.sandbox_status()).info
    hold(
        any(scene.session in value for value in info.values()),
        f"SandboxStatus does not name the session: {dict(info)}",
    )


@case("an aborted import leaves the shim as it was, for another session", "4.12")
async def again_after_abort(scene: Scene) -> None:
    await scene.prepared()
    for side in Side:
        require(await scene.shims[side].cancel(scene.session), OK, what="Cancel")
        require(await scene.shims[side].cleanup(scene.session), OK, what="Cleanup")
    scene.session += "-again"
    scene.relay = None
    await scene.transferred()
    require(await scene.src.finalize(scene.session, RESUME), OK, what="RESUME on the SRC")
    require(await scene.dst.finalize(scene.session, STOP), OK, what="STOP on the DST")


@case("the last session's Finalize, Cancel and Cleanup again are no error", "3")
async def remembered(scene: Scene) -> None:
    await scene.export()
    require(await scene.src.cancel(scene.session), OK, what="Cancel")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="FinalizeSandbox(RESUME)")
    require(await scene.src.cleanup(scene.session), OK, what="Cleanup")
    require(await scene.src.finalize(scene.session, RESUME), OK, what="the same Finalize after the end")
    require(await scene.src.cancel(scene.session), OK, what="the same Cancel after the end")
    require(await scene.src.cleanup(scene.session), OK, what="the same Cleanup after the end")
    require(await scene.src.finalize(scene.session, STOP), FP, what="the other Finalize after the end")
    hold((await scene.src.status()).vm_state == "running", "a late STOP ended the guest")


@case("concurrent duplicates of a call are one call", "3")
async def duplicates(scene: Scene) -> None:
    other = {side: await scene.another(side) for side in Side}

    async def twice(what: str, side: Side, *given: Any) -> list[Answer]:
        both = (scene.shims[side], other[side])
        answers = await asyncio.gather(*(getattr(shim, what)(scene.session, *given) for shim in both))
        return [require(answer, OK, what=f"{what}, called twice at once") for answer in answers]

    one, two = await twice("export", Side.SOURCE)
    scene.config = one.response.config
    hold(one.response == two.response, "two concurrent exports gave two blobs")
    await twice("import_", Side.DESTINATION, scene.config)
    await twice("prepare", Side.DESTINATION)
    for side in Side:
        await scene.give_socket(side, flowing=True)
    await twice("transfer", Side.SOURCE)
    await scene.wait_for(Side.DESTINATION, "TransferCompleted")
    for side in Side:
        await twice("finalize", side, BACK[side])
        await twice("cleanup", side)


# 13. Other calls during a session


@case("what would change the sandbox is refused at once while it moves", "4.13")
async def other_calls(scene: Scene) -> None:
    await scene.reach("Transferring", Side.SOURCE)
    refused: dict[str, Answer] = {
        "StopSandbox": await scene.src.stop_sandbox(),
        "RunProcess": await scene.src.run_process("p"),
    }
    for what, answer in refused.items():
        require(answer, FP, what=f"{what} in Transferring", names=(scene.session,))
    info = (await scene.src.sandbox_status()).info
    told = (info.get("migration.state"), info.get("migration.session"))
    hold(told == ("Transferring", scene.session), f"SandboxStatus says {told}")


# 14. Options


@case("options out of range are refused by name, value and range", "4.14")
async def options_out_of_range(scene: Scene) -> None:
    params = "memory_transfer_throttle_params"
    wrong: dict[str, dict[str, Any]] = {
        "memory_transport": {"memory_transport": 0},
        "throttling_scale": {params: {"throttling_scale": 200.0}},
        "minimum_throttle_percentage": {params: {"minimum_throttle_percentage": 300}},
        "maximum_number_of_brownout_transfer_passes": {
            params: {"maximum_number_of_brownout_transfer_passes": 0}
        },
        "target_blackout_transfer_time": {params: {"target_blackout_transfer_time": 4_000_000_000}},
        "throttle_worker_count": {"compression_settings": {"throttle_worker_count": 0}},
    }
    for name, fields in wrong.items():
        options = o.InitializeOptions(**({"memory_transport": TCP} | fields))
        require(
            await scene.src.export(scene.session, options), IA, what=f"{name} out of range", names=(name,)
        )
    hold(await scene.src.state() == "Idle", "refused options left a session behind")


@case("options in range are taken", "4.14")
async def options_in_range(scene: Scene) -> None:
    scene.options = o.InitializeOptions(memory_transport=TCP, perf_tracing_enabled=True)
    scene.options.memory_transfer_throttle_params.target_blackout_transfer_time = 300
    scene.options.memory_transfer_throttle_params.maximum_number_of_brownout_transfer_passes = 20
    await scene.prepared()


@case("options that must agree and do not are refused, naming both", "4.14")
async def options_disagree(scene: Scene) -> None:
    await scene.imported()
    other = o.InitializeOptions(memory_transport=TCP, checksum_verification=True)
    answer = await scene.dst.prepare(scene.session, other)
    if answer.code == IA:
        raise Skipped(f"checksum_verification cannot be honoured here: {answer.message}")
    require(answer, FP, what="checksum_verification on one side only", names=("true", "false"))


@case("a transfer with checksum verification goes through", "4.14")
async def checksum(scene: Scene) -> None:
    scene.options = o.InitializeOptions(memory_transport=TCP, checksum_verification=True)
    answer = await scene.src.export(scene.session, scene.options)
    if answer.code == IA:
        raise Skipped(f"checksum_verification cannot be honoured here: {answer.message}")
    await scene.transferred()


# 15. State on disk


@case("a session survives both its shims", "4.15", moves=True)
async def restarted(scene: Scene) -> None:
    await scene.transferred()
    before = {side: await scene.shims[side].told(scene.session, "DONE") for side in Side}
    for side in Side:
        await scene.shims[side].close()
        await scene.target.restart(side)
        await scene.reconnect(side)
        now = await scene.shims[side].state()
        hold(now == "TransferCompleted", f"after a restart the {side.value} is {now}")
        told = await scene.shims[side].told(scene.session, "DONE")
        same = [one.SerializeToString() for one in told] == [one.SerializeToString() for one in before[side]]
        hold(same, f"the record of the {side.value} is another after a restart")
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()),
        OK,
        "UNAVAILABLE",
        what="RESUME",
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()),
        OK,
        "UNAVAILABLE",
        what="STOP",
    )
    require(
        await scene.dst.finalize(scene.session, RESUME, await scene.src.receipt()),
        OK,
        what="RESUME after all",
    )
    require(
        await scene.src.finalize(scene.session, STOP, await scene.dst.receipt()), OK, what="STOP after all"
    )


# 16. Ids


@case("session ids are checked, and never part of a path", "4.16")
async def session_ids(scene: Scene) -> None:
    for call in (scene.src.cancel, scene.src.listens, scene.src.transfer, scene.src.prepare):
        require(await call(""), IA, what="an empty session_id on a shim without a session")
    for bad in ("", "x" * 257, "a\nb", "a\0b"):
        require(await scene.src.export(bad), IA, what=f"session_id {bad[:8]!r}")
    scene.session = "../../" + "\u00e9" * 10 + f"/{os.getpid()} x"
    await scene.prepared()


@case("another session's id is refused, naming both", "4.16")
async def other_session(scene: Scene) -> None:
    await scene.export()
    calls = {
        "Cancel": scene.src.cancel,
        "Cleanup": scene.src.cleanup,
        "Transfer": scene.src.transfer,
        "Notifications": scene.src.listens,
        "PrepareSandbox": scene.src.prepare,
    }
    for what, call in calls.items():
        answer = await call("another-session")
        require(answer, IA, what=f"{what} of another session", names=("another-session", scene.session))
        require(await call(""), IA, what=f"{what} with an empty session_id")
    require(await scene.src.finalize("another-session", RESUME), IA, what="Finalize of another session")
