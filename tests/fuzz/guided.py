"""A small coverage-guided fuzzer: keeps inputs that reach a pair of lines which no input reached before.

Deterministic for a seed and a budget, so that a failure replays. Uses sys.settrace, which every Python has.
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, Final

Target = Callable[[bytes], None]
Edge = tuple[CodeType, int, int]

INPUT_BYTES_MAX: Final = 220
HANG_CPU_S: Final = 1.0
INTERESTING: Final = (0, 1, 2, 3, 5, 7, 0x10, 0x20, 0x3F, 0x40, 0x41, 0x7F, 0x80, 0xFE, 0xFF)
_tracing_off: Final[Any] = None


class Finding(Exception):
    """An input that breaks a rule."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}; input {data.hex()}")
        self.data = data


def _hangs(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise TimeoutError(f"it runs for more than {HANG_CPU_S} s of CPU time")


class Edges:
    """Which line followed which in the files that are watched."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = frozenset(files)
        self.seen: set[Edge] = set()

    def run(self, target: Target, data: bytes) -> int:
        """Run one input; how many pairs of lines are new.

        Raises:
            Finding: the target raised.
        """
        before = len(self.seen)
        signal.signal(signal.SIGVTALRM, _hangs)
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_CPU_S)
        sys.settrace(self._enter)
        try:
            target(data)
        except Exception as error:
            raise Finding(data, error) from error
        finally:
            sys.settrace(_tracing_off)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return len(self.seen) - before

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        last = 0
        seen = self.seen

        def line(frame: FrameType, event: str, arg: object) -> Any:
            nonlocal last
            del arg
            number = frame.f_lineno if event == "line" else -1
            seen.add((code, last, number))
            last = number
            return line

        return line


class Fuzzer:
    """Seeds, what has been kept, and the next input."""

    def __init__(self, target: Target, edges: Edges, seeds: Iterable[bytes], seed: int) -> None:
        self._target = target
        self._edges = edges
        self._random = random.Random(seed)
        self.kept: list[bytes] = []
        self.inputs = 0
        for data in seeds:
            self._try(data, keep=True)

    def run(self, inputs: int) -> None:
        """Try so many more inputs.

        Raises:
            Finding: one of them broke a rule.
        """
        for _ in range(inputs):
            self._try(self.next_input(), keep=False)

    def _try(self, data: bytes, *, keep: bool) -> None:
        self.inputs += 1
        if self._edges.run(self._target, data) or keep:
            self.kept.append(data)

    def next_input(self) -> bytes:
        """A kept input, changed in a few places; now and then two of them joined."""
        draw = self._random
        data = bytearray(draw.choice(self.kept))
        if draw.random() < 0.25:
            other = draw.choice(self.kept)
            data = data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1) :]
        for _ in range(draw.choice((1, 1, 2, 3, 6))):
            self._change(data)
        return bytes(data[:INPUT_BYTES_MAX])

    def _change(self, data: bytearray) -> None:
        draw = self._random
        place = draw.randrange(len(data) + 1)
        what = draw.randrange(6)
        if what == 0 or place == len(data):
            data[place:place] = bytes(draw.choice(INTERESTING) for _ in range(draw.randint(1, 4)))
        elif what == 1:
            data[place] = draw.choice(INTERESTING)
        elif what == 2:
            data[place] ^= 1 << draw.randrange(8)
        elif what == 3:
            data[place] = draw.randrange(256)
        elif what == 4 and draw.random() < 0.5:
            # A whole step again, with another value in it: what a second and third call looks like.
            step = data[place : place + draw.randint(6, 16)]
            if step:
                step[draw.randrange(len(step))] = draw.choice(INTERESTING)
            data[place + len(step) : place + len(step)] = step
        elif what == 4:
            del data[place : place + draw.randint(1, 8)]
        else:
            data[place:place] = data[place : place + draw.randint(1, 12)]
