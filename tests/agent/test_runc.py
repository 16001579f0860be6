"""What runc says -> one line and a code."""

from __future__ import annotations

import json

import pytest

from sandshift.agent.runc import explained
from ttrpc import Code


def log(*messages: str) -> str:
    entries = [{"level": "error", "msg": text, "time": "2026-01-01T00:00:00Z"} for text in messages]
    return "\n".join(
        [
            '{"level":"warning","msg":"cannot toggle freezer"}',
            *(json.dumps(one) for one in entries),
            "half a li",
        ]
    )


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        (
            'runc create failed: unable to start container process: exec: "x": executable file not found in $PATH',
            Code.NOT_FOUND,
            'exec: "x": executable file not found in $PATH',
        ),
        (
            'exec failed: unable to start container process: exec: "/x": stat /x: no such file or directory',
            Code.NOT_FOUND,
            'exec: "/x": stat /x: no such file or directory',
        ),
        (
            'runc create failed: unable to start container process: exec: "/etc/x": permission denied',
            Code.PERMISSION_DENIED,
            'exec: "/etc/x": permission denied',
        ),
        (
            'runc create failed: error during container init: error mounting\n "/a" to rootfs at "/b": no such file',
            Code.INVALID_ARGUMENT,
            'error mounting "/a" to rootfs at "/b": no such file',
        ),
        ("cannot exec in a paused container", Code.FAILED_PRECONDITION, "cannot exec in a paused container"),
        (
            "cannot exec a container that has stopped",
            Code.FAILED_PRECONDITION,
            "cannot exec a container that has stopped",
        ),
        (
            "runc create failed: container with given ID already exists",
            Code.ALREADY_EXISTS,
            "container with given ID already exists",
        ),
        (
            "runc create failed: mkdir /run/x: no space left on device",
            Code.RESOURCE_EXHAUSTED,
            "mkdir /run/x: no space left on device",
        ),
    ],
)
def test_the_last_complaint_is_told_without_its_preambles(said, code, message):
    told = explained("container c cannot be made", log("an earlier one", said), 1)
    assert (told.code, told.message) == (code, f"container c cannot be made: {message}")


@pytest.mark.parametrize(("status", "ended"), [(3, "ended with 3"), (-9, "was killed by signal 9")])
def test_an_end_without_a_reason_is_told_as_such(status, ended):
    told = explained("container c cannot be made", "no json\n[]\n", status)
    assert told.code is Code.INTERNAL
    assert told.message == f"container c cannot be made: runc {ended} and gave no reason"
