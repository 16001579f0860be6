"""The demo's workload. Runs inside the guest, alone: standard library only, shipped as ``python3 -c``.

Two processes. The parent is a TCP counter service whose state lives in its memory. Its child, the writer, keeps a working
set of pages in a pattern that proves itself: each page repeats one 16-byte record of marker, page number and generation.
Sweep after sweep it checks that a page still holds the last generation, then writes the next. A write that got lost
on the way to another host is so found by the writer itself.

Protocol, lines over TCP: ``N <nonce>`` is answered ``<number> <nonce>``; ``CHECK`` has the writer stop, check every page,
and answers its report as one JSON line; ``STATUS`` answers how it goes, without a check. The same JSON goes to stdout.
``WHO`` answers the guest's boot id and uptime.

Arguments: port, marker (16 hex digits), working set in pages, rate in pages per second.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

PAGE = 4096
RECORD = struct.Struct("<8sII")
REPEATS = PAGE // RECORD.size
EXAMPLES_MAX = 8
TICK_S = 0.02
BATCH_PAGES_MAX = 256
REPORT_EVERY_S = 1.0


def page(marker: bytes, number: int, generation: int) -> bytes:
    """What page `number` holds in `generation`."""
    return RECORD.pack(marker, number, generation) * REPEATS


class WorkingSet:
    """The pages. Those below `cursor` hold `generation`, the others the one before."""

    def __init__(self, marker: bytes, pages: int) -> None:
        self.marker = marker
        self.pages = pages
        self.memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.generation = 0
        self.cursor = pages
        self.checked = 0
        self.bad: dict[int, dict[str, object]] = {}
        for number in range(pages):
            self.memory[number * PAGE : number * PAGE + PAGE] = page(marker, number, 0)

    def rewrite(self, count: int) -> None:
        """Check and rewrite the next `count` pages of the sweep."""
        memory = self.memory
        pack = RECORD.pack
        marker = self.marker
        while count > 0:
            if self.cursor == self.pages:
                self.cursor = 0
                self.generation += 1
            first = self.cursor
            last = min(first + count, self.pages)
            generation = self.generation
            for number in range(first, last):
                start = number * PAGE
                end = start + PAGE
                if memory[start:end] != pack(marker, number, generation - 1) * REPEATS:
                    self.found_bad(number, generation - 1)
                memory[start:end] = pack(marker, number, generation) * REPEATS
            self.checked += last - first
            self.cursor = last
            count -= last - first

    def check_all(self) -> None:
        """Check every page against what it must hold, and count."""
        for number in range(self.pages):
            generation = self.generation if number < self.cursor else self.generation - 1
            if self.memory[number * PAGE : number * PAGE + PAGE] != page(self.marker, number, generation):
                self.found_bad(number, generation)
        self.checked += self.pages

    def found_bad(self, number: int, expected: int) -> None:
        """Remember a page that does not hold what it must, with what it holds, once."""
        if number in self.bad:
            return
        held = self.memory[number * PAGE : number * PAGE + PAGE]
        marker, _, generation = RECORD.unpack_from(held)
        stale = held == page(self.marker, number, generation) and marker == self.marker
        self.bad[number] = {
            "page": number,
            "expected_generation": expected,
            "found_generation": generation if stale else None,
        }

    def report(self, **more: object) -> dict[str, object]:
        return {
            "pages": self.pages,
            "pages_checked": self.checked,
            "pages_stale": len(self.bad),
            "examples": list(self.bad.values())[:EXAMPLES_MAX],
            "generation": self.generation,
            **more,
        }


class Pace:
    """How many pages are due, by a rate. What a pause of the whole guest left undone is not caught up."""

    def __init__(self, pages_per_s: float, now_s: float) -> None:
        self.pages_per_s = pages_per_s
        self.last_s = now_s
        self.owed = 0.0

    def due(self, now_s: float) -> int:
        self.owed += min(now_s - self.last_s, 10 * TICK_S) * self.pages_per_s
        self.last_s = now_s
        count = min(int(self.owed), BATCH_PAGES_MAX)
        self.owed -= count
        return count


def write_on(commands: socket.socket, marker: bytes, pages: int, pages_per_s: float) -> None:
    """The writer: until the parent's end of `commands` closes."""
    working_set = WorkingSet(marker, pages)
    pace = Pace(pages_per_s, time.monotonic())
    checked, since_s = 0, time.monotonic()
    rate = 0.0
    tell({"event": "ready", **working_set.report()})
    commands.sendall(b"READY\n")
    while True:
        count = pace.due(time.monotonic())
        working_set.rewrite(count)
        now_s = time.monotonic()
        if now_s - since_s >= REPORT_EVERY_S:
            rate = (working_set.checked - checked) * PAGE / (now_s - since_s)
            checked, since_s = working_set.checked, now_s
            tell({"event": "progress", **working_set.report(bytes_per_s=round(rate))})
        idle_s = 0 if count == BATCH_PAGES_MAX else TICK_S
        if select.select([commands], [], [], idle_s)[0]:
            command = commands.recv(4096)
            if not command:
                return
            final = b"CHECK" in command
            if final:
                working_set.check_all()
            report = {"event": "final" if final else "status", **working_set.report(bytes_per_s=round(rate))}
            tell(report)
            commands.sendall(json.dumps(report).encode() + b"\n")
            pace.last_s = time.monotonic()


def who() -> dict[str, object]:
    """Which boot of which kernel this is, and for how long it has been up."""
    with open("/proc/sys/kernel/random/boot_id") as file:  # noqa: PTH123  (pathlib costs a guest 50 ms to import)
        return {"boot_id": file.read().strip(), "uptime_s": time.clock_gettime(time.CLOCK_BOOTTIME)}


def tell(report: dict[str, object]) -> None:
    print(json.dumps(report), flush=True)


class Counter:
    """The counter service: every numbered request gets the next number, whoever asks."""

    def __init__(self, listener: socket.socket, writer: socket.socket) -> None:
        self.listener = listener
        self.writer = writer
        self.number = 0
        self.clients: dict[int, socket.socket] = {}
        self.unread: dict[int, bytes] = {}
        self.asked: list[socket.socket] = []
        self.from_writer = b""

    def serve(self) -> None:
        poller = select.poll()
        poller.register(self.listener, select.POLLIN)
        poller.register(self.writer, select.POLLIN)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor == self.listener.fileno():
                    client, _ = self.listener.accept()
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.clients[client.fileno()] = client
                    poller.register(client, select.POLLIN)
                elif descriptor == self.writer.fileno():
                    if not self.take_from_writer():
                        return
                elif not self.take_from_client(descriptor):
                    poller.unregister(descriptor)
                    self.unread.pop(descriptor, None)
                    self.clients.pop(descriptor).close()

    def take_from_client(self, descriptor: int) -> bool:
        client = self.clients[descriptor]
        try:
            data = client.recv(65536)
            if not data:
                return False
            *lines, self.unread[descriptor] = (self.unread.get(descriptor, b"") + data).split(b"\n")
            answers = []
            for line in lines:
                if line.startswith(b"N "):
                    self.number += 1
                    answers.append(b"%d %s\n" % (self.number, line[2:]))
                elif line in (b"CHECK", b"STATUS"):
                    self.asked.append(client)
                    self.writer.sendall(line + b"\n")
                elif line == b"WHO":
                    answers.append(json.dumps(who()).encode() + b"\n")
            if answers:
                client.sendall(b"".join(answers))
        except OSError:
            return False
        return True

    def take_from_writer(self) -> bool:
        data = self.writer.recv(65536)
        if not data:
            return False
        *lines, self.from_writer = (self.from_writer + data).split(b"\n")
        for line in lines:
            if self.asked:
                with contextlib.suppress(OSError):
                    self.asked.pop(0).sendall(line + b"\n")
        return True


def main(port: int, marker: str, pages: int, pages_per_s: float) -> None:
    ours, writers = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        write_on(writers, bytes.fromhex(marker), pages, pages_per_s)
        os._exit(0)
    writers.close()
    ours.recv(len(b"READY\n"))
    listener = socket.create_server(("", port), backlog=16)
    tell({"event": "listening", "port": listener.getsockname()[1]})
    Counter(listener, ours).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
