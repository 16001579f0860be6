"""What a missing Go means: a loud skip for a person, a failure in CI."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.interop.toolchain import NoGo, go_program


def program_or_skip(environment: Mapping[str, str]) -> Path:
    """The built Go program."""
    try:
        return go_program()
    except NoGo as missing:
        if environment.get("CI"):
            pytest.fail(str(missing))
        warnings.warn(str(missing), stacklevel=1)
        pytest.skip(str(missing))
