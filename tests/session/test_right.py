"""The rules of right-to-run.md, sections 3, 7, 8 and 9, each by its number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandshift.errors import IllegalMove, Unavailable, VmRefused
from sandshift.session import right
from sandshift.session.right import (
    CallMade,
    Channel,
    DestroyVm,
    FrameRead,
    Licence,
    Record,
    Reply,
    SendFrame,
    StartVcpus,
    StopTransfer,
    Transfer,
    WriteRecord,
    licence_of,
)
from sandshift.session.right_licence import MAY_RUN, demand
from sandshift.session.statement import Ask, Cell, Seal, Statement
from sandshift.session.states import Action, Call, Event, Side, State
from tests.session.example_shell import Shim, cut, pair, settle
from tests.session.test_right_tables import party, told


def record(cell: Cell, state: State = State.TRANSFER_COMPLETED, *, complete: bool = True) -> Record:
    return Record(cell.side, "s-1", cell, state, complete=complete)


def restart(
    cell: Cell, state: State = State.TRANSFER_COMPLETED, *, complete: bool = True, **look: object
) -> str:
    event = right.Restarted(**({"vm_alive": True} | look))  # type: ignore[arg-type]
    after, steps = right.handle(right.restored_party(record(cell, state, complete=complete)), event)
    return f"{after.cell.name}: {told(steps)}"


class TestWritingBeforeActing:
    """Rule 1."""

    def test_no_frame_shows_and_no_act_follows_a_cell_that_is_not_on_disk(self) -> None:
        source, destination = pair()
        for shim, call in ((destination, Call.RESUME), (source, Call.STOP)):
            shim.call(call)
        for shim in (source, destination):
            for position, step in enumerate(shim.done):
                if step in ("SendFrame", "StartVcpus", "DestroyVm", "Reply"):
                    assert "WriteRecord" in shim.done[: position + 1]

    def test_held_and_starting_share_one_fsync_while_a_resume_waits(self) -> None:
        waiting = party(Cell.READY, call=Call.RESUME)
        _, steps = right.handle(waiting, FrameRead(Statement(Cell.RELEASED, Ask.TELL, 3)))
        assert [type(step) for step in steps] == [WriteRecord, StartVcpus]

    def test_running_follows_its_act(self) -> None:
        starting, _ = right.handle(party(Cell.HELD), CallMade(Call.RESUME))
        _, steps = right.handle(starting, right.StartSucceeded())
        assert told(steps) == "write RUNNING+Finalized, send RUNNING, OK"

    def test_the_answer_to_a_question_waits_for_the_start_and_is_given_then(self) -> None:
        waiting = party(Cell.READY, call=Call.RESUME)
        starting, _ = right.handle(waiting, FrameRead(Statement(Cell.RELEASED, Ask.TELL, 77)))
        assert (
            told(right.handle(starting, right.StartSucceeded())[1])
            == "write RUNNING+Finalized, =send RUNNING, OK"
        )
        assert told(right.handle(starting, right.StartRefused())[1]) == "write HELD, =send HELD, INTERNAL"


class TestTimeOutsAndLosses:
    """Rule 8."""

    @pytest.mark.parametrize("event", [right.AskTimedOut(), right.ChannelLost()], ids=["time-out", "loss"])
    @pytest.mark.parametrize("cell", list(Cell))
    @pytest.mark.parametrize("call", [Call.RESUME, Call.STOP])
    def test_end_the_waiting_call_and_change_no_cell(
        self, event: right.RightEvent, cell: Cell, call: Call
    ) -> None:
        waiting = party(cell, call=call)
        after, steps = right.handle(waiting, event)
        assert after.record == waiting.record
        assert told(steps) == "UNAVAILABLE"
        assert after.pending is None

    def test_a_start_under_way_is_not_ended_by_them(self) -> None:
        starting, _ = right.handle(party(Cell.HELD), CallMade(Call.RESUME))
        for event in (right.AskTimedOut(), right.ChannelLost()):
            after, steps = right.handle(starting, event)
            assert steps == ()
            assert after.pending == starting.pending

    def test_without_a_channel_asking_fails_at_once(self) -> None:
        alone = replace(party(Cell.RELEASED), channel=Channel.DOWN)
        assert told(right.handle(alone, CallMade(Call.STOP))[1]) == "UNAVAILABLE"


class TestDeathOfTheOwnVm:
    """Rules 7 and 9."""

    @pytest.mark.parametrize(
        ("cell", "state", "then"),
        [
            (Cell.OPEN, State.TRANSFER_COMPLETED, "write GONE, send GONE"),
            (Cell.OPEN, State.TRANSFERRING, "write KEPT+Failed"),
            (Cell.OPEN, State.SOURCE_EXPORTED, "write KEPT+Failed"),
            (Cell.RELEASED, State.TRANSFER_COMPLETED, "write GONE, send GONE"),
            (Cell.KEPT, State.FINALIZED, ""),
            (Cell.GONE, State.TRANSFER_COMPLETED, ""),
            (Cell.NONE, State.TRANSFERRING, "write REFUSED+Failed"),
            (Cell.READY, State.TRANSFER_COMPLETED, "write REFUSED, send REFUSED"),
            (Cell.HELD, State.TRANSFER_COMPLETED, "write REFUSED, send REFUSED"),
            (Cell.STARTING, State.TRANSFER_COMPLETED, "write LOST, send LOST"),
            (Cell.RUNNING, State.FINALIZED, ""),
            (Cell.RETURNING, State.TRANSFER_COMPLETED, "write REFUSED, send REFUSED"),
        ],
    )
    def test_decides_what_the_cell_becomes(self, cell: Cell, state: State, then: str) -> None:
        after, steps = right.handle(
            replace(party(cell, state), channel=Channel.HEARD), right.VmDied("killed")
        )
        if cell is Cell.NONE:
            then = f"{then}"
            steps = tuple(step for step in steps if not isinstance(step, SendFrame))
        assert told(steps) == then
        assert not after.vm_alive

    def test_ends_a_waiting_stop_of_the_source_with_success(self) -> None:
        _, steps = right.handle(party(Cell.RELEASED, call=Call.STOP), right.VmDied())
        assert told(steps) == "write GONE, send GONE, destroy, write GONE+Finalized, OK"

    def test_ends_a_waiting_resume_of_the_source_with_a_refusal(self) -> None:
        _, steps = right.handle(party(Cell.RELEASED, call=Call.RESUME), right.VmDied())
        assert told(steps) == "write GONE, send GONE, FP"

    @pytest.mark.parametrize(
        ("state", "then"),
        [
            (State.TRANSFER_COMPLETED, "write LOST, send LOST, FP"),
            (State.CANCELLED, "write LOST+Cancelled, send LOST, FP"),
        ],
    )
    def test_while_it_is_started_makes_the_destination_lost(self, state: State, then: str) -> None:
        """Also when the session was cancelled before that RESUME."""
        starting, _ = right.handle(party(Cell.HELD, state), CallMade(Call.RESUME))
        after, steps = right.handle(starting, right.VmDied())
        assert told(steps) == then
        assert after.cell is Cell.LOST
        assert "whether it ran is unknowable" in _refusal(steps).message

    def test_resume_of_a_kept_source_is_refused_and_its_cleanup_is_done(self) -> None:
        dead = replace(party(Cell.KEPT, State.FAILED), vm_alive=False)
        assert told(right.handle(dead, CallMade(Call.RESUME))[1]) == "FP"
        assert told(right.handle(dead, CallMade(Call.CLEANUP))[1]) == "keep, write KEPT+Idle, OK"

    def test_after_running_is_an_ordinary_crash_that_can_be_cleaned_up(self) -> None:
        dead = replace(party(Cell.RUNNING, State.CANCELLED), vm_alive=False)
        assert told(right.handle(dead, CallMade(Call.RESUME))[1]) == "FP"
        assert told(right.handle(dead, CallMade(Call.CLEANUP))[1]) == "keep, write RUNNING+Idle, OK"


class TestTheLicence:
    """The one place that starts virtual CPUs demands it, and only session/ makes it."""

    def test_cannot_be_made_elsewhere(self) -> None:
        with pytest.raises(TypeError, match=r"made by session/right_licence\.py alone"):
            Licence("I say so", object())

    @pytest.mark.parametrize("cell", Cell)
    def test_is_given_for_a_record_that_may_run_and_for_no_other(self, cell: Cell) -> None:
        if cell in MAY_RUN:
            assert licence_of(record(cell)).reason == f"s-1: {cell.side.word} {cell.name}"
        else:
            with pytest.raises(IllegalMove, match=f"is {cell.name} and may not run the guest"):
                licence_of(record(cell))

    def test_is_demanded_where_virtual_cpus_start(self) -> None:
        demand(licence_of(None))
        with pytest.raises(TypeError, match="start with a Licence from session/, not with object"):
            demand(object())

    def test_may_run_is_section_2(self) -> None:
        assert {Cell.OPEN, Cell.KEPT, Cell.STARTING, Cell.RUNNING} == MAY_RUN

    def test_a_sandbox_that_never_had_a_session_may_boot(self) -> None:
        assert licence_of(None).reason == "the sandbox never had a session"

    def test_starts_carry_the_licence_of_the_record_written_just_before(self) -> None:
        for cell, now in ((Cell.HELD, "destination STARTING"), (Cell.OPEN, "source KEPT")):
            _, steps = right.handle(party(cell), CallMade(Call.RESUME))
            starts = [step for step in steps if isinstance(step, StartVcpus)]
            assert starts[0].licence == licence_of(steps[0].record)  # type: ignore[union-attr]
            assert starts[0].licence.reason == f"s-1: {now}"


class TestRestart:
    """Section 7."""

    def test_starts_no_virtual_cpu_whatever_the_record(self) -> None:
        for cell in set(Cell) - {Cell.NONE}:
            for state in (State.TRANSFER_COMPLETED, State.CANCELLED, State.FAILED, State.FINALIZED):
                for transfer in Transfer:
                    for running in (False, True):
                        before = right.restored_party(record(cell, state))
                        _, steps = right.handle(before, right.Restarted(True, running, transfer))
                        assert not any(isinstance(step, StartVcpus) for step in steps)

    def test_a_source_that_is_gone_destroys_its_vm(self) -> None:
        assert restart(Cell.GONE) == "GONE: destroy"

    def test_a_source_that_keeps_the_right_ends_a_transfer_that_goes_on(self) -> None:
        cancelling = restart(Cell.KEPT, State.CANCELLING, complete=False, transfer=Transfer.GOING_ON)
        assert cancelling == "KEPT: stop transfer, write KEPT+Cancelled"
        assert (
            restart(Cell.KEPT, State.CANCELLED, complete=False, transfer=Transfer.GOING_ON)
            == "KEPT: stop transfer"
        )

    def test_an_open_source_whose_transfer_completed_meanwhile_is_complete(self) -> None:
        found = restart(Cell.OPEN, State.TRANSFERRING, complete=False, transfer=Transfer.COMPLETED)
        assert found == "OPEN: write OPEN"

    @pytest.mark.parametrize("transfer", [Transfer.FAILED, Transfer.NONE])
    def test_an_open_source_whose_transfer_failed_or_never_began_keeps_the_right(
        self, transfer: Transfer
    ) -> None:
        found = restart(Cell.OPEN, State.TRANSFERRING, complete=False, transfer=transfer)
        assert found == "KEPT: write KEPT+Failed"

    def test_an_open_source_whose_transfer_goes_on_goes_on(self) -> None:
        assert restart(Cell.OPEN, State.TRANSFERRING, complete=False, transfer=Transfer.GOING_ON) == "OPEN: "

    def test_a_destination_whose_vm_is_complete_is_ready(self) -> None:
        found = restart(Cell.NONE, State.TRANSFERRING, complete=False, transfer=Transfer.COMPLETED)
        assert found == "READY: write READY"

    def test_a_destination_killed_before_the_first_byte_is_ready_once_all_came(self) -> None:
        found = restart(Cell.NONE, State.SOCKET_READY, complete=False, transfer=Transfer.COMPLETED)
        assert found.startswith("READY: write")
        assert found.endswith("write READY")

    def test_a_destination_found_running_in_starting_is_running(self) -> None:
        assert restart(Cell.STARTING, vm_running=True) == "RUNNING: write RUNNING"

    def test_a_destination_found_paused_in_starting_waits_for_resume(self) -> None:
        assert restart(Cell.STARTING) == "STARTING: "

    def test_a_destination_found_dead_in_starting_is_lost(self) -> None:
        assert restart(Cell.STARTING, vm_alive=False) == "LOST: write LOST"

    @pytest.mark.parametrize(
        ("cell", "then"),
        [(Cell.OPEN, "GONE"), (Cell.RELEASED, "GONE"), (Cell.READY, "REFUSED"), (Cell.HELD, "REFUSED"),
         (Cell.RETURNING, "REFUSED")],
    )  # fmt: skip
    def test_then_rule_9(self, cell: Cell, then: str) -> None:
        assert restart(cell, vm_alive=False) == f"{then}: write {then}"

    def test_a_session_that_has_ended_is_left_alone(self) -> None:
        assert restart(Cell.GONE, State.IDLE, vm_alive=False) == "GONE: "

    def test_a_source_that_finds_the_channel_again_speaks_first(self) -> None:
        back, steps = right.handle(right.restored_party(record(Cell.OPEN)), right.ChannelUp())
        assert told(steps) == "send OPEN"
        silent, steps = right.handle(right.restored_party(record(Cell.READY)), right.ChannelUp())
        assert steps == ()
        assert (back.channel, silent.channel) == (Channel.UP, Channel.UP)

    def test_a_destination_that_had_heard_the_source_before_it_was_killed_asks_at_once(self) -> None:
        back, steps = right.handle(
            right.restored_party(record(Cell.READY), next_ask=5), right.ChannelUp(heard=True)
        )
        assert steps == ()
        _, steps = right.handle(back, CallMade(Call.RESUME))
        assert steps == (SendFrame(Statement(Cell.READY, ask=Ask.GIVE, ask_number=5)),)


class TestTheEndOfTheTransfer:
    def test_the_source_speaks_first_and_shows_its_handover_record_each_time(self) -> None:
        transferring = replace(party(Cell.OPEN, State.TRANSFERRING), channel=Channel.UP)
        complete, steps = right.handle(transferring, right.MemoryComplete(b"offsets"))
        assert told(steps) == "write OPEN, send OPEN"
        assert steps[1] == SendFrame(Statement(Cell.OPEN, handover=b"offsets"))
        assert right.current_statement(complete) == Statement(Cell.OPEN, handover=b"offsets")

    def test_the_destination_keeps_the_sources_record_from_held_on(self) -> None:
        held, _ = right.handle(party(Cell.READY), FrameRead(Statement(Cell.RELEASED, handover=b"offsets")))
        assert held.record.peer_handover == b"offsets"
        started, _ = right.handle(
            party(Cell.READY), CallMade(Call.RESUME, Statement(Cell.RELEASED, handover=b"o"))
        )
        assert started.record.peer_handover == b"o"

    def test_a_failed_transfer_leaves_the_right_with_the_source(self) -> None:
        after, steps = right.handle(party(Cell.OPEN, State.TRANSFERRING), right.TransferFailed("peer gone"))
        assert told(steps) == "write KEPT+Failed"
        assert after.record.reason == "peer gone"
        silent = replace(party(Cell.NONE, State.TRANSFERRING), channel=Channel.UP)
        assert told(right.handle(silent, right.TransferFailed("broken"))[1]) == "write REFUSED+Failed"

    def test_memory_that_is_of_no_use_is_refused_and_the_source_learns_why(self) -> None:
        after, steps = right.handle(
            party(Cell.READY, call=Call.RESUME), right.TransferFailed("digests differ")
        )
        assert told(steps) == "write REFUSED+Failed, send REFUSED, FP"
        assert "digests differ" in _refusal(steps).message
        assert right.current_statement(after).reason == "digests differ"

    def test_a_cancel_that_came_too_late_for_the_vm_keeps_the_guest_here(self) -> None:
        cancelled = replace(party(Cell.KEPT, State.CANCELLED), channel=Channel.UP)
        incomplete = replace(cancelled, record=replace(cancelled.record, complete=False))
        after, steps = right.handle(incomplete, right.MemoryComplete(b"h"))
        assert told(steps) == "write KEPT+Cancelled, send KEPT"
        assert after.complete

    def test_a_completion_nobody_waits_for_changes_nothing(self) -> None:
        assert right.handle(party(Cell.REFUSED, State.CANCELLED), right.MemoryComplete())[1] == ()
        assert right.handle(party(Cell.RELEASED), right.MemoryComplete())[1] == ()
        assert right.handle(party(Cell.HELD), right.TransferFailed())[1] == ()

    def test_moves_before_completion_are_written_like_every_other(self) -> None:
        exported = right.new_party(Side.SOURCE, "s-1", State.SOURCE_EXPORTED)
        ready, steps = right.handle(exported, right.Moved(Event.SOCKET_GIVEN))
        assert told(steps) == "write OPEN+SocketReady"
        with pytest.raises(IllegalMove, match="SocketReady cannot become 'prepared'"):
            right.handle(ready, right.Moved(Event.PREPARED))


class TestBeforeTheSourceKeepsTheGuest:
    """Rule 3."""

    def test_a_transfer_that_might_go_on_is_stopped_before_the_start(self) -> None:
        failed = replace(
            party(Cell.KEPT, State.FAILED), record=record(Cell.KEPT, State.FAILED, complete=False)
        )
        _, steps = right.handle(failed, CallMade(Call.RESUME))
        assert [type(step) for step in steps] == [StopTransfer, StartVcpus]

    def test_a_refused_start_can_be_repeated(self) -> None:
        starting, _ = right.handle(party(Cell.OPEN), CallMade(Call.RESUME))
        refused, steps = right.handle(starting, right.StartRefused("no memory"))
        assert told(steps) == "INTERNAL"
        assert "refused to start the guest, which has not run here: no memory" in _refusal(steps).message
        assert told(right.handle(refused, CallMade(Call.RESUME))[1]) == "start"

    def test_a_cleanup_that_starts_the_guest_ends_the_session_only_then(self) -> None:
        starting, steps = right.handle(party(Cell.KEPT, State.CANCELLED), CallMade(Call.CLEANUP))
        assert told(steps) == "start"
        ended, steps = right.handle(starting, right.StartSucceeded())
        assert told(steps) == "keep, write KEPT+Idle, OK"
        assert ended.record.action is Action.RESUME


class TestForce:
    """Section 9."""

    @pytest.mark.parametrize(
        ("cell", "then"),
        [(Cell.RELEASED, "write KEPT, start"), (Cell.READY, "write STARTING, start"),
         (Cell.RETURNING, "write STARTING, start")],
    )  # fmt: skip
    def test_is_written_down_before_anything_is_done(self, cell: Cell, then: str) -> None:
        after, steps = right.handle(party(cell), right.ForceResume(cell))
        assert told(steps) == then
        assert steps[0] == WriteRecord(after.record)
        assert after.record.forced
        done, steps = right.handle(after, right.StartSucceeded())
        assert done.record.forced
        assert isinstance(steps[-1], Reply)
        assert steps[-1].refusal is None

    def test_is_refused_if_the_cell_is_another_by_now(self) -> None:
        after, steps = right.handle(party(Cell.RELEASED), right.ForceResume(Cell.OPEN))
        assert told(steps) == "FP"
        assert "the operator decided on OPEN" in _refusal(steps).message
        assert not after.record.forced

    def test_a_forced_destination_goes_on_where_the_source_said_that_its_streams_ended(self) -> None:
        """Whatever the source said last: a frame, or a receipt that was carried here and did not help."""
        heard = replace(party(Cell.READY), peer=Statement(Cell.OPEN, handover=b"offsets"))
        after, _ = right.handle(heard, right.ForceResume(Cell.READY))
        assert after.record.peer_handover == b"offsets"
        returning = party(Cell.RETURNING)
        written = replace(returning, record=replace(returning.record, peer_handover=b"earlier"))
        after, _ = right.handle(written, right.ForceResume(Cell.RETURNING))
        assert after.record.peer_handover == b"earlier"

    @pytest.mark.parametrize("cell", [c for c in Cell if c not in right.FORCEABLE])
    def test_is_refused_where_the_protocol_decides(self, cell: Cell) -> None:
        assert told(right.handle(party(cell), right.ForceResume(cell))[1]) == "FP"

    def test_is_refused_without_a_vm_and_before_completion(self) -> None:
        dead = replace(party(Cell.READY), vm_alive=False)
        assert "VM is dead" in _refusal(right.handle(dead, right.ForceResume(Cell.READY))[1]).message
        early = party(Cell.OPEN, State.TRANSFERRING)
        assert told(right.handle(early, right.ForceResume(Cell.OPEN))[1]) == "FP"


class TestMessages:
    def test_the_destination_runs_the_guest(self) -> None:
        _, steps = right.handle(party(Cell.RELEASED), CallMade(Call.RESUME, Statement(Cell.RUNNING)))
        assert _refusal(steps).kind is IllegalMove
        assert _refusal(steps).message == (
            "session 's-1', FinalizeSandbox(RESUME) on the source: the destination runs the guest "
            "(source RELEASED, destination RUNNING): finalize this side with STOP"
        )

    def test_released_and_the_destination_does_not_answer(self) -> None:
        _, steps = right.handle(party(Cell.RELEASED, call=Call.STOP), right.AskTimedOut())
        assert _refusal(steps).kind is Unavailable
        assert _refusal(steps).message == (
            "session 's-1', FinalizeSandbox(STOP) on the source: this side has released the right to run and does "
            "not know who has it, and the destination does not answer (source RELEASED, destination not heard from): "
            "repeat with its receipt"
        )

    def test_every_refusal_names_session_call_and_both_cells(self) -> None:
        for cell in Cell:
            for call in (Call.RESUME, Call.STOP):
                own = replace(party(cell), channel=Channel.DOWN, peer=Statement(_a_cell_of(cell.side.peer)))
                for step in right.handle(own, CallMade(call))[1]:
                    if isinstance(step, Reply) and step.refusal is not None:
                        text = step.refusal.message
                        assert text.startswith(f"session 's-1', {call.value} on the {cell.side.word}: ")
                        assert f"{cell.side.word} {cell.name}" in text
                        assert f"{cell.side.peer.word} {_a_cell_of(cell.side.peer).name}" in text
                        assert step.refusal.error().message == text

    def test_a_refused_start_is_internal(self) -> None:
        starting, _ = right.handle(party(Cell.HELD), CallMade(Call.RESUME))
        held, steps = right.handle(starting, right.StartRefused("device busy"))
        assert _refusal(steps).kind is VmRefused
        assert held.cell is Cell.HELD


class TestPlainClients:
    """Section 8, last paragraph: no receipts."""

    def test_success_with_the_destination_first(self) -> None:
        source, destination = pair()
        assert destination.call(Call.RESUME).refusal is None
        assert source.call(Call.STOP).refusal is None
        self._ended(source, destination, runner=destination)

    def test_success_with_the_source_first(self) -> None:
        source, destination = pair()
        assert source.call(Call.STOP).refusal is None
        assert destination.call(Call.RESUME).refusal is None
        self._ended(source, destination, runner=destination)

    @pytest.mark.parametrize(
        "order",
        [
            [("S", Call.RESUME), ("D", Call.STOP)],
            [("D", Call.STOP), ("S", Call.RESUME)],
            [("S", Call.CANCEL), ("D", Call.CANCEL), ("S", Call.RESUME), ("D", Call.STOP)],
            [("D", Call.CANCEL), ("S", Call.CANCEL), ("D", Call.STOP), ("S", Call.RESUME)],
            [("S", Call.CANCEL), ("S", Call.CLEANUP), ("D", Call.STOP)],
            [("S", Call.CANCEL), ("D", Call.CANCEL), ("S", Call.CLEANUP), ("D", Call.CLEANUP)],
            [("D", Call.CANCEL), ("D", Call.CLEANUP), ("S", Call.RESUME)],
            [("D", Call.CANCEL), ("S", Call.RESUME), ("D", Call.CLEANUP)],
        ],
        ids=lambda order: " ".join(f"{side}.{call.name}" for side, call in order),
    )
    @pytest.mark.parametrize("held", [False, True], ids=["from READY", "from HELD"])
    def test_rolling_back_in_every_order(self, order: list[tuple[str, Call]], held: bool) -> None:
        source, destination = pair()
        if held:
            destination.starts.append(right.StartRefused("busy"))
            refusal = destination.call(Call.RESUME).refusal
            assert refusal is not None
            assert refusal.kind is VmRefused
            assert destination.party.cell is Cell.HELD
        for side, call in order:
            reply = (source if side == "S" else destination).call(call)
            assert reply.refusal is None, (side, call, reply)
        self._ended(source, destination, runner=source)

    def test_with_a_dead_channel_before_anyone_asked(self) -> None:
        source, destination = pair()
        cut(source)
        for shim, call in ((destination, Call.RESUME), (source, Call.STOP)):
            before = shim.party.record
            refusal = shim.call(call).refusal
            assert refusal is not None
            assert refusal.kind is Unavailable
            assert shim.party.record == before
        assert source.call(Call.RESUME).refusal is None
        assert destination.call(Call.STOP).refusal is None
        self._ended(source, destination, runner=source)

    def test_with_a_dead_channel_after_somebody_asked_both_keep_their_vm(self) -> None:
        source, destination = pair()
        source.call(Call.STOP, destination.receipt)  # released and GONE: the other order
        source, destination = pair()
        cut(source)
        source.call(Call.STOP, destination.receipt)
        assert source.party.cell is Cell.RELEASED
        for shim, call in ((source, Call.STOP), (source, Call.RESUME), (destination, Call.RESUME)):
            refusal = shim.call(call).refusal
            assert refusal is not None
            assert refusal.kind is Unavailable
        assert (source.vm, destination.vm) == ("stopped", "stopped")

    def test_going_forward_on_purpose_over_a_dead_channel(self) -> None:
        source, destination = pair()
        cut(source)
        assert source.call(Call.STOP, destination.receipt).refusal is not None
        assert destination.call(Call.RESUME, source.receipt).refusal is None
        assert source.call(Call.STOP, destination.receipt).refusal is None
        self._ended(source, destination, runner=destination)

    def _ended(self, source: Shim, destination: Shim, runner: Shim) -> None:
        other = destination if runner is source else source
        for shim in (source, destination):
            if shim.party.state is not State.IDLE:
                settle(shim)
                assert shim.call(Call.CLEANUP).refusal is None
        assert (runner.vm, other.vm) == ("running", "dead")
        assert source.party.state is destination.party.state is State.IDLE


class TestTheExampleShell:
    def test_cleanup_keeps_the_last_statement_before_the_session_ends(self) -> None:
        source, destination = pair()
        destination.call(Call.RESUME)
        source.call(Call.STOP)
        source.call(Call.CLEANUP)
        assert source.done[-3:] == ["KeepLastStatement", "WriteRecord", "Reply"]
        seal = Seal("s-1", b"k" * 32)
        assert seal.open_receipt(source.kept[0], side=Side.SOURCE).cell is Cell.GONE

    def test_both_shims_crash_everywhere_and_receipts_finish_the_move(self) -> None:
        source, destination = pair()
        source.crash()
        destination.crash()
        assert source.call(Call.STOP, destination.receipt).refusal is not None
        source.crash()
        assert destination.call(Call.RESUME, source.receipt).refusal is None
        destination.crash()
        assert destination.vm == "running"
        assert destination.party.cell is Cell.RUNNING
        assert source.call(Call.STOP, destination.receipt).refusal is None
        assert (source.vm, destination.vm) == ("dead", "running")

    def test_a_dead_vm_is_noticed_before_any_answer(self) -> None:
        source, destination = pair()
        destination.vm = "dead"
        assert source.call(Call.STOP).refusal is not None
        assert destination.party.cell is Cell.REFUSED
        assert source.party.cell is Cell.KEPT
        assert source.vm == "stopped"
        assert source.call(Call.RESUME).refusal is None
        assert source.vm == "running"

    def test_a_second_call_while_one_is_served_is_the_shells_mistake(self) -> None:
        with pytest.raises(AssertionError, match="while FinalizeSandbox"):
            right.handle(party(Cell.RELEASED, call=Call.STOP), CallMade(Call.STOP))
        with pytest.raises(AssertionError, match="were not being started"):
            right.handle(party(Cell.HELD), right.StartSucceeded())

    def test_in_the_middle_of_a_transfer_rolling_back_stops_it(self) -> None:
        source, destination = pair(complete=False)
        assert source.call(Call.RESUME).refusal is None
        assert destination.call(Call.STOP).refusal is None
        assert "StopTransfer" in source.done
        assert (source.vm, destination.vm) == ("running", "dead")


def _refusal(steps: tuple[right.Step, ...]) -> right.Refusal:
    replies = [step for step in steps if isinstance(step, Reply)]
    assert replies[-1].refusal is not None
    return replies[-1].refusal


def _a_cell_of(side: Side) -> Cell:
    return Cell.RELEASED if side is Side.SOURCE else Cell.HELD


def test_a_destination_never_destroys_what_it_may_run_and_a_source_neither() -> None:
    for cell in MAY_RUN | {Cell.RELEASED, Cell.HELD, Cell.RETURNING}:
        for call in (Call.RESUME, Call.STOP, Call.CANCEL):
            _, steps = right.handle(party(cell), CallMade(call))
            assert not any(isinstance(step, DestroyVm) for step in steps), (cell, call)
