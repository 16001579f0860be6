"""Errors survive the way over the wire."""

from __future__ import annotations

import pytest

from sandshift import errors
from sandshift.status import CLASSES, CODES, UNEXPLAINED, error_of, from_status, status_of, to_status
from ttrpc import Code, StatusError


def _subclasses(error: type[errors.SandshiftError]) -> list[type[errors.SandshiftError]]:
    return [found for child in error.__subclasses__() for found in (child, *_subclasses(child))]


@pytest.mark.parametrize("error", CODES)
def test_every_class_comes_back_as_itself_with_its_message(error: type[errors.SandshiftError]) -> None:
    back = from_status(to_status(error("sandbox s-1: nothing left to say")))
    assert type(back) is error
    assert back.message == "sandbox s-1: nothing left to say"


def test_every_class_of_the_tree_has_a_code() -> None:
    for error in _subclasses(errors.SandshiftError):
        assert any(ancestor in CODES for ancestor in error.__mro__), error


def test_a_list_of_blockers_comes_back_whole_as_its_parent_class() -> None:
    blocked = errors.Blocked(
        "sandbox s-1 cannot move", [errors.Blocker("qemu.version", "is 7.2", "install 9.0")]
    )
    back = from_status(to_status(blocked))
    assert type(back) is errors.IllegalMove
    assert back.message == "sandbox s-1 cannot move: qemu.version: is 7.2; install 9.0"


def test_a_lost_guest_is_data_loss() -> None:
    assert status_of(errors.GuestLost("gone on both sides")) == (Code.DATA_LOSS, "gone on both sides")


def test_every_code_becomes_a_class_and_those_we_never_send_become_defects() -> None:
    for code in Code:
        assert type(error_of(code, "m")) is CLASSES.get(code, errors.Defect)
    assert type(error_of(Code.PERMISSION_DENIED, "m")) is errors.Rejected


def test_a_foreign_exception_tells_the_client_nothing_of_its_text() -> None:
    assert status_of(ValueError("key=hunter2")) == (Code.UNKNOWN, UNEXPLAINED)


def test_a_status_is_passed_on_as_it_is() -> None:
    assert status_of(StatusError(Code.ABORTED, "reset")) == (Code.ABORTED, "reset")
