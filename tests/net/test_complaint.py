"""What `ip` wrote becomes an error that names the object and says what to do. The texts are iproute2 6.1's own."""

from __future__ import annotations

import pytest

from sandshift.errors import AlreadyThere, NotFound, NotSupported, Rejected, Unavailable
from sandshift.net.complaint import explain, failed_step
from sandshift.net.plan import Tap, plan_taps

PLAN = plan_taps([Tap("ss0", bridge="br7"), Tap("ss1", bridge="br7")])


@pytest.mark.parametrize(
    ("complaint", "kind", "words"),
    [
        (
            "ioctl(TUNSETIFF): Device or resource busy\nCommand failed -:4\n",
            AlreadyThere,
            "tap ss1 exists already.*ip link delete",
        ),
        ('Error: argument "br7" is wrong: Device does not exist\n', NotFound, "bridge br7 does not exist"),
        (
            'Cannot open network namespace "n9": No such file or directory\n',
            NotFound,
            "network namespace n9 does not exist.*ip netns add n9",
        ),
        (
            "ioctl(TUNSETIFF): Operation not permitted\nCommand failed -:1\n",
            Rejected,
            "tap ss0: making network devices needs root",
        ),
        ("open: Permission denied\nCommand failed -:1\n", Rejected, "run it as root"),
        ("open: No such file or directory\nCommand failed -:1\n", NotSupported, "tap ss0: .*modprobe tun"),
        ("Something odd\nCommand failed -:3\n", Unavailable, "tap ss0: ip refused: Something odd$"),
        ("", Unavailable, "network: ip refused: without a word"),
    ],
)
def test_a_complaint_becomes_the_error_that_says_what_to_do(complaint, kind, words):
    error = explain(PLAN, complaint)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def test_the_failed_step_is_found_by_its_line_or_by_the_argument_it_quotes():
    assert failed_step(PLAN, "Command failed -:4\n") == 3
    assert failed_step(PLAN, 'Error: argument "br7" is wrong: Device does not exist\n') == 1
    assert failed_step(PLAN, "what?") is None
