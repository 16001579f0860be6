"""Without Go: loud for a person, a failure in CI."""

from __future__ import annotations

import pytest

from tests.interop import toolchain
from tests.interop.presence import program_or_skip


@pytest.fixture
def no_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_, **__: None)


@pytest.mark.usefixtures("no_go")
def test_a_person_is_told_and_goes_on() -> None:
    with (
        pytest.warns(UserWarning, match="NO GO"),
        pytest.raises(pytest.skip.Exception, match="NO GO"),
    ):
        program_or_skip({})


@pytest.mark.usefixtures("no_go")
def test_in_ci_it_is_a_failure() -> None:
    with pytest.raises(pytest.fail.Exception, match="NO GO"):
        program_or_skip({"CI": "true"})
