"""What is on disk when a write has returned: the data, and every folder on the way to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandshift.shim import durable
from sandshift.shim.durable import AppendOnlyFile, write_atomically


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file and folder that was synced, in order, by the name that it has at that moment."""
    found: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "fdatasync")}

    def noting(name: str):  # type: ignore[no-untyped-def]
        def sync(descriptor: int) -> None:
            found.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            real[name](descriptor)

        return sync

    for name in real:
        monkeypatch.setattr(durable.os, name, noting(name))
    return found


def test_a_new_folder_is_durable_in_its_parent_before_a_file_in_it_is(
    tmp_path: Path, synced: list[str]
) -> None:
    path = tmp_path / "sandboxes" / "test" / "box" / "sandbox"
    write_atomically(path, b"data")
    folders = [str(tmp_path), str(tmp_path / "sandboxes"), str(tmp_path / "sandboxes" / "test")]
    assert synced[:3] == folders
    assert Path(synced[3]).parent == path.parent
    assert synced[4:] == [str(path.parent)]


def test_a_folder_that_is_there_costs_no_sync(tmp_path: Path, synced: list[str]) -> None:
    file = AppendOnlyFile(tmp_path / "session")
    file.append(b"record")
    file.close()
    assert synced == [str(tmp_path), str(tmp_path / "session")]
