"""The workload, run natively: what it does in the guest it does here, only faster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sandshift.cli.demo.guest import workload as guest
from sandshift.cli.demo.workload import PAGE_BYTES, Workload, guest_source, pattern_page
from sandshift.errors import Rejected
from tests.demo.guest_memory import alter_page

MARKER = b"demo-tst"


@pytest.fixture
def running():
    """The workload as the guest runs it, on a port of the kernel's choice."""
    workload = Workload(working_set_mib=4, dirty_mib_per_s=100, port=0, marker=MARKER)
    process = subprocess.Popen([sys.executable, *workload.arguments()[1:]], stdout=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["event"] == "ready"
    port = json.loads(process.stdout.readline())["port"]
    yield process, port
    process.kill()
    process.wait()
    process.stdout.close()


def ask(connection, line: str) -> bytes:
    connection.sendall(line.encode() + b"\n")
    return connection.makefile("rb").readline()


def test_both_sides_mean_the_same_by_the_pattern():
    assert guest.page(MARKER, 7, 9) == pattern_page(MARKER, 7, 9)
    assert len(pattern_page(MARKER, 7, 9)) == PAGE_BYTES == guest.PAGE


def test_the_counter_counts_for_all_its_connections_together(running):
    _, port = running
    with (
        socket.create_connection(("127.0.0.1", port)) as one,
        socket.create_connection(("127.0.0.1", port)) as other,
    ):
        assert ask(one, "N a") == b"1 a\n"
        assert ask(other, "N b") == b"2 b\n"
        one.sendall(b"N c\nN d\nN")
        one.sendall(b" e\n")
        lines = one.makefile("rb")
        assert [lines.readline() for _ in range(3)] == [b"3 c\n", b"4 d\n", b"5 e\n"]


def test_a_final_check_looks_at_every_page_and_finds_them_right(running):
    _, port = running
    with socket.create_connection(("127.0.0.1", port)) as connection:
        report = json.loads(ask(connection, "CHECK"))
    assert report["event"] == "final"
    assert report["pages"] == 1024
    assert report["pages_checked"] >= 1024
    assert report["pages_stale"] == 0


def test_the_writer_reports_the_rate_it_reaches(running):
    process, _ = running
    report = json.loads(process.stdout.readline())
    assert report["event"] == "progress"
    assert report["bytes_per_s"] == pytest.approx(100 << 20, rel=0.5)
    assert report["generation"] > 1


def test_who_answers_this_boot(running):
    _, port = running
    with socket.create_connection(("127.0.0.1", port)) as connection:
        who = json.loads(ask(connection, "WHO"))
    assert who["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert who["uptime_s"] > 0


def test_it_ends_its_writer_with_itself(running):
    process, _ = running
    process.kill()
    # The writer holds stdout too: end of file comes when it is gone.
    assert [json.loads(line)["event"] for line in process.stdout] in ([], ["progress"])


def test_a_page_that_lost_a_write_is_found_with_both_generations():
    working_set = guest.WorkingSet(MARKER, 8)
    working_set.rewrite(8)
    working_set.rewrite(3)
    working_set.memory[5 * PAGE_BYTES : 6 * PAGE_BYTES] = pattern_page(MARKER, 5, 0)
    working_set.check_all()
    report = working_set.report()
    assert report["pages_stale"] == 1
    assert report["examples"] == [{"page": 5, "expected_generation": 1, "found_generation": 0}]


def test_one_altered_byte_is_found_by_the_writer_as_it_comes_by():
    working_set = guest.WorkingSet(MARKER, 8)
    working_set.memory[2 * PAGE_BYTES + 4095] ^= 1
    working_set.rewrite(8)
    assert working_set.report()["examples"] == [
        {"page": 2, "expected_generation": 0, "found_generation": None}
    ]
    working_set.check_all()
    assert working_set.report()["pages_stale"] == 1, "found once, counted once, though it is right again"


def test_a_sweep_goes_on_where_it_stopped_and_starts_again_at_the_end():
    working_set = guest.WorkingSet(MARKER, 8)
    working_set.rewrite(20)
    assert (working_set.generation, working_set.cursor, working_set.checked) == (3, 4, 20)
    working_set.check_all()
    assert working_set.bad == {}


def test_a_writer_without_a_rate_only_looks_on():
    pace = guest.Pace(0.0, 0.0)
    assert [pace.due(at_s) for at_s in (0.1, 5.0)] == [0, 0]


def test_a_pause_of_the_guest_is_not_caught_up():
    pace = guest.Pace(1000.0, 0.0)
    assert pace.due(0.1) == 100
    assert pace.due(5.1) == 200


def test_the_source_fits_one_argument_of_a_process():
    assert len(guest_source()) < 128 * 1024, "MAX_ARG_STRLEN is 32 pages"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"working_set_mib": 0}, "working set 0 MiB is outside 1 to 16384 MiB"),
        ({"dirty_mib_per_s": 5000}, "dirty rate 5000 MiB/s is outside 0 to 4096 MiB/s"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(options, message):
    with pytest.raises(Rejected, match=message):
        Workload(**options)


def test_a_page_altered_from_outside_is_found(running):
    """The same harm that is done to a paused destination in the negative control, done to the writer's own process."""
    process, port = running
    (writer,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    number = alter_page(int(writer), MARKER)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        report = json.loads(ask(connection, "CHECK"))
    assert report["pages_stale"] == 1
    assert [example["page"] for example in report["examples"]] == [number]
    assert report["examples"][0]["found_generation"] is None
