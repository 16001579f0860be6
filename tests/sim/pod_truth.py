"""What really happened in the guest, whoever was told of it: seen at the fake processes themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sandshift.shim.sandbox import EXIT_KILLED, EXIT_MIGRATED
from sandshift.vmm.fake_containers import FakeTask
from tests.sim.stays import STDOUT, Program, Stay

if TYPE_CHECKING:
    from tests.sim.stage import Stage

LINE_BYTES: Final = 9
TENTH: Final = 10
SHOWN_BYTES: Final = 30


class Truth:
    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.exits: dict[str, int] = {}
        """Process id -> its exit code."""
        self.said: dict[tuple[str, int], int] = {}
        """(process id, stream) -> how many bytes an ended process has said."""

    def watched(self) -> Callable[[FakeTask, int, float], None]:
        """Stands for FakeTask.end."""
        end = FakeTask.end

        def ended(task: FakeTask, code: int, now_s: float) -> None:
            end(task, code, now_s)
            if task.process_id not in self.exits:
                self.exits[task.process_id] = task.exit_code
                self._stage.tell(f"guest: {task.process_id} ends with {task.exit_code}")
                for number, stream in task.streams.items():
                    self.said[task.process_id, number] = stream.end

        return ended

    def wrong_exit(self, stay: Stay, exec_id: str, code: int) -> str:
        """Why this may not be told now; empty if it may."""
        process_id = f"{stay.base}:{exec_id}"
        real = self.exits.get(process_id)
        if code == real:
            return ""
        runs_here = stay.host in self._stage.witness.running.values()
        if code in (EXIT_MIGRATED, EXIT_KILLED) and not runs_here:
            return ""
        if real is None:
            return f"{process_id} has not ended, and the guest runs {'here' if runs_here else 'elsewhere'}"
        return f"{process_id} has ended with {real}"


def wrong_output(program: Program, stays: Sequence[Stay], stream: int) -> str:
    """What is wrong with all that came of a stream, on all hosts in order; empty if it is an unbroken beginning."""
    pieces = [
        (stay, stay.fifos[program.exec_id].data(stream)) for stay in stays if program.exec_id in stay.fifos
    ]
    data = b"".join(piece for _, piece in pieces)
    at = _echoed(program, stays, data) if program.echoes else _counted(data, stream)
    if at == len(data):
        return ""
    where, behind = "", 0
    for stay, piece in pieces:
        if at < behind + len(piece):
            where = f"byte {at - behind} of {len(piece)} at {stay}"
            break
        behind += len(piece)
    before, after = data[max(0, at - SHOWN_BYTES) : at], data[at : at + SHOWN_BYTES]
    return f"{program.process_id} stream {stream}: {where}: after {before!r} comes {after!r}"


def _counted(data: bytes, stream: int) -> int:
    """How much of it is right."""
    step = 1 if stream == STDOUT else TENTH
    count = -(-len(data) // LINE_BYTES)
    right = b"".join(b"%08d\n" % number for number in range(0, count * step, step))
    return _same(data, right)


def _echoed(program: Program, stays: Sequence[Stay], data: bytes) -> int:
    """Of each stay's stdin a beginning, in order."""
    return sum(echoes(program, stays, data).values())


def echoes(program: Program, stays: Sequence[Stay], data: bytes) -> dict[Stay, int]:
    """How much of what was written to each stay's stdin has come out again."""
    come: dict[Stay, int] = {}
    for stay in stays:
        if program.exec_id in stay.fifos:
            at = sum(come.values())
            come[stay] = _same(data[at:], bytes(stay.fifos[program.exec_id].written))
    return come


def _same(data: bytes, right: bytes) -> int:
    if right.startswith(data):
        return len(data)
    return next(
        (at for at, (one, other) in enumerate(zip(data, right, strict=False)) if one != other),
        min(len(data), len(right)),
    )
