"""The containers of a fake guest: processes that say numbered lines, echo, wait or end, and move with the guest's state.

It keeps what the agent keeps: output by offset until it is acknowledged, exits until they are forgotten, stdin by offset.
Time is an argument. Programs, by the first word of a process's args:

    count [LINES_PER_S]   numbered lines on stdout, every tenth number on stderr too (100 a second)
    flood                 numbered lines as fast as somebody takes them
    last LINES RATE CODE  as count, and ends with that code after so many lines
    cat                   stdin to stdout, until stdin ends
    say TEXT              one line, then it ends
    exit CODE             ends at once
    wait                  ends when it is killed
    missing               is no program
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from sandshift.errors import AlreadyThere, IllegalMove, NotFound, Rejected

STDOUT: Final = 1
STDERR: Final = 2
STREAM_BYTES_MAX: Final = 64 << 10
"""What a stream keeps; then its process waits in its write."""
STDIN_BYTES_MAX: Final = 16 << 10
LINES_PER_S: Final = 100.0
LINE_BYTES: Final = 9
TENTH: Final = 10
"""Every tenth line is on stderr too."""
FLOOD_LINES_PER_S: Final = 1e6
SIGNAL_EXIT: Final = 128
ENDING_SIGNALS: Final = frozenset({1, 2, 9, 15})


@dataclass(slots=True)
class FakeStream:
    base: int = 0
    """Offset of the first byte that is kept."""
    data: bytearray = field(default_factory=bytearray)
    ended: bool = False

    @property
    def end(self) -> int:
        return self.base + len(self.data)

    @property
    def room(self) -> int:
        return STREAM_BYTES_MAX - len(self.data)


@dataclass(slots=True)
class FakeTask:
    """One process of a container."""

    process_id: str
    pid: int
    container_id: str
    args: list[str]
    terminal: bool
    stdin: bool
    started: bool
    lines: int = 0
    owed: float = 0.0
    """Part of a line that time has paid for."""
    taken: int = 0
    """Of stdin."""
    input_ended: bool = False
    exit_code: int = -1
    exited_at_ns: int = 0
    size: tuple[int, int] = (0, 0)
    signals: list[int] = field(default_factory=list)
    streams: dict[int, FakeStream] = field(default_factory=dict)

    @property
    def exited(self) -> bool:
        return self.exit_code >= 0

    def end(self, code: int, now_s: float) -> None:
        if not self.exited:
            self.exit_code, self.exited_at_ns = code, int(now_s * 1e9)
            for stream in self.streams.values():
                stream.ended = True

    def write(self, stream: int, data: bytes) -> bool:
        """Whether there was room for it."""
        kept = self.streams[stream]
        if kept.room < len(data):
            return False
        kept.data += data
        return True

    def run(self, passed_s: float, now_s: float) -> None:
        """Do what the program does in `passed_s`."""
        match self.args:
            case ["exit", code]:
                self.end(int(code), now_s)
            case ["say", *words]:
                self.write(STDOUT, " ".join(words).encode() + b"\n")
                self.end(0, now_s)
            case ["count", *rate]:
                self._count(passed_s * (float(rate[0]) if rate else LINES_PER_S))
            case ["last", lines, rate, code]:
                self._count(passed_s * float(rate), int(lines))
                if self.lines >= int(lines):
                    self.end(int(code), now_s)
            case ["flood"]:
                self._count(passed_s * FLOOD_LINES_PER_S)
            case ["cat"] if self.input_ended:
                self.end(0, now_s)

    def _count(self, lines: float, most: float = math.inf) -> None:
        """`most`: how many lines it ever says."""
        self.owed += lines
        wanted = int(min(self.owed, most - self.lines))
        if wanted < 1:
            return
        said = range(self.lines, self.lines + min(wanted, self._room_lines()))
        self.streams[STDOUT].data += b"".join([b"%08d\n" % number for number in said])
        if STDERR in self.streams:
            tenths = range(said.start + -said.start % TENTH, said.stop, TENTH)
            self.streams[STDERR].data += b"".join([b"%08d\n" % number for number in tenths])
        self.lines = said.stop
        # A process that waits in its write is paid for no more than that line.
        self.owed = self.owed - len(said) if len(said) == wanted else 1.0

    def _room_lines(self) -> int:
        """How many lines there is room for, on stdout and, for every tenth of them, on stderr."""
        room = self.streams[STDOUT].room // LINE_BYTES
        if STDERR in self.streams:
            tenths = self.streams[STDERR].room // LINE_BYTES
            room = min(room, -self.lines % TENTH + tenths * TENTH)
        return room


@dataclass(slots=True)
class FakeContainer:
    container_id: str
    spec: str
    rootfs: str
    paused: bool = False
    resources: str = ""


class FakeContainers:
    """Raises what the agent's client raises."""

    def __init__(self) -> None:
        self.containers: dict[str, FakeContainer] = {}
        self.tasks: dict[str, FakeTask] = {}
        self.pod: dict[str, object] | None = None
        self._pids = 100
        self.oom: list[tuple[int, str, int]] = []
        """(number, container, at_ns)."""

    # Containers

    def create(self, container_id: str, spec: bytes, rootfs: object, *, terminal: bool, stdin: bool) -> int:
        document = json.loads(spec)
        args = document["process"]["args"]
        if args == ["missing"]:
            raise NotFound(f"container {container_id}: there is no program missing")
        made = FakeContainer(container_id, spec.decode(), repr(rootfs))
        if (known := self.containers.get(container_id)) is not None:
            if (known.spec, known.rootfs) != (made.spec, made.rootfs):
                raise AlreadyThere(f"container {container_id} is another one: choose a new id")
            return self.tasks[f"{container_id}:"].pid
        self.containers[container_id] = made
        return self._task(
            f"{container_id}:", container_id, args, terminal=terminal, stdin=stdin, started=False
        ).pid

    def start(self, container_id: str) -> None:
        self._container(container_id)
        self.tasks[f"{container_id}:"].started = True

    def start_process(
        self, process_id: str, container_id: str, spec: bytes, *, terminal: bool, stdin: bool
    ) -> int:
        init = self.tasks[f"{self._container(container_id).container_id}:"]
        if init.exited:
            raise IllegalMove(f"container {container_id} does not run")
        if (known := self.tasks.get(process_id)) is not None:
            return known.pid
        args = json.loads(spec)["args"]
        return self._task(process_id, container_id, args, terminal=terminal, stdin=stdin, started=True).pid

    def _task(
        self,
        process_id: str,
        container_id: str,
        args: Sequence[str],
        *,
        terminal: bool,
        stdin: bool,
        started: bool,
    ) -> FakeTask:
        self._pids += 1
        streams = {STDOUT: FakeStream()} if terminal else {STDOUT: FakeStream(), STDERR: FakeStream()}
        task = FakeTask(
            process_id,
            self._pids,
            container_id,
            list(args),
            terminal,
            stdin or terminal,
            started,
            streams=streams,
        )
        self.tasks[process_id] = task
        return task

    def delete(self, container_id: str, now_s: float) -> None:
        if container_id not in self.containers:
            return
        init = self.tasks.get(f"{container_id}:")
        if init is not None and init.started and not init.exited:
            raise IllegalMove(f"container {container_id} runs: end it first")
        if init is not None:
            init.end(SIGNAL_EXIT + 9, now_s)
        del self.containers[container_id]

    def set_paused(self, container_id: str, *, paused: bool) -> None:
        self._container(container_id).paused = paused

    def update(self, container_id: str, resources: bytes) -> None:
        self._container(container_id).resources = resources.decode()

    def pids(self, container_id: str) -> list[tuple[int, str]]:
        self._container(container_id)
        return [
            (task.pid, task.process_id)
            for task in self.tasks.values()
            if task.container_id == container_id and not task.exited
        ]

    def _container(self, container_id: str) -> FakeContainer:
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id} is not known") from None

    # Processes

    def task(self, process_id: str) -> FakeTask:
        try:
            return self.tasks[process_id]
        except KeyError:
            raise NotFound(
                f"process {process_id} is not known: it was never started, or is forgotten"
            ) from None

    def signal(self, process_id: str, number: int, now_s: float) -> None:
        """An ending signal ends it, and with an init everything in its container."""
        task = self.task(process_id)
        if task.exited:
            return
        task.signals.append(number)
        if number in ENDING_SIGNALS:
            task.end(SIGNAL_EXIT + number, now_s)
            if task.process_id == f"{task.container_id}:":
                for other in self.tasks.values():
                    if other.container_id == task.container_id:
                        other.end(SIGNAL_EXIT + 9, now_s)

    def forget(self, process_id: str) -> None:
        task = self.tasks.get(process_id)
        if task is not None and not task.exited:
            raise IllegalMove(f"process {process_id} is still running: end it first")
        self.tasks.pop(process_id, None)

    def read(self, process_id: str, stream: int, offset: int) -> tuple[bytes, bool]:
        """What there is from `offset` on, and whether the stream has ended there."""
        kept = self.task(process_id).streams[stream]
        if not kept.base <= offset <= kept.end:
            raise Rejected(f"process {process_id}: offset {offset} is not in {kept.base} to {kept.end}")
        data = bytes(kept.data[offset - kept.base :])
        return data, kept.ended and not data

    def acknowledge(self, process_id: str, stream: int, offset: int) -> None:
        kept = self.task(process_id).streams[stream]
        if kept.base < offset <= kept.end:
            del kept.data[: offset - kept.base]
            kept.base = offset

    def write_input(self, process_id: str, offset: int, data: bytes, *, eof: bool) -> int:
        """Takes what fits; how far stdin is taken."""
        task = self.task(process_id)
        if not task.stdin:
            raise IllegalMove(f"process {process_id} was started without stdin")
        if offset > task.taken:
            raise Rejected(f"process {process_id}: stdin is taken up to {task.taken}, not to {offset}")
        fresh = data[task.taken - offset :]
        if task.args == ["cat"] and not task.exited:
            fresh = fresh[: min(STDIN_BYTES_MAX, task.streams[STDOUT].room)]
            task.write(STDOUT, fresh)
        task.taken += len(fresh)
        task.input_ended |= eof and task.taken >= offset + len(data)
        return task.taken

    # Time and state

    def advance(self, passed_s: float, now_s: float) -> None:
        for task in self.tasks.values():
            container = self.containers.get(task.container_id)
            paused = container is not None and container.paused
            if task.started and not task.exited and not paused:
                task.run(passed_s, now_s)

    def state(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "containers": [asdict(one) for one in self.containers.values()],
            "tasks": [_task_state(one) for one in self.tasks.values()],
            "pod": self.pod,
            "pids": self._pids,
            "oom": self.oom,
        }

    def take_state(self, state: Mapping[str, Any]) -> None:
        self.containers = {one["container_id"]: FakeContainer(**one) for one in state["containers"]}
        self.tasks = {one["process_id"]: _task_from_state(one) for one in state["tasks"]}
        self.pod = state["pod"]
        self._pids = int(state["pids"])
        self.oom = [(number, name, at) for number, name, at in state["oom"]]


def _task_state(task: FakeTask) -> dict[str, Any]:
    state = {name: getattr(task, name) for name in FakeTask.__slots__ if name != "streams"}
    state["streams"] = {
        str(number): [one.base, base64.b64encode(one.data).decode(), one.ended]
        for number, one in task.streams.items()
    }
    return state


def _task_from_state(state: Mapping[str, Any]) -> FakeTask:
    streams = {
        int(number): FakeStream(base, bytearray(base64.b64decode(data)), ended)
        for number, (base, data, ended) in state["streams"].items()
    }
    return FakeTask(**{**state, "streams": streams, "size": tuple(state["size"])})
