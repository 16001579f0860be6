"""Our part of the guest's root: the agent, the link, the wire, ttrpc and the protobuf runtime of this installation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google.protobuf
from google.protobuf.internal import api_implementation

import sandshift
import ttrpc
from sandshift.errors import NotSupported

PLACE: Final = "opt/sandshift"
"""Where it lies in the root."""
START_SCRIPT: Final = f"{PLACE}/start.py"
IMPORTS: Final = ("google._upb._message", "start")
"""What must work in the guest: protobuf's compiled core, and everything else."""
_START: Final = f"""import gc
import sys

gc.disable()
sys.path.append("/{PLACE}")
# Both would be loaded and never used: OpenSSL by asyncio, protobuf's pure Python core beside its compiled one.
sys.modules["ssl"] = None
sys.modules["google.protobuf.internal.python_message"] = sys
from sandshift.agent.main import main

gc.enable()
gc.freeze()
if __name__ == "__main__":
    main()
"""
_ROOMS: Final = ("agent", "link", "wire")
_PROTOBUF_LEFT_OUT: Final = ("compiler", "testdata", "util")


@dataclass(frozen=True, slots=True, order=True)
class OwnFile:
    place: str
    """Relative to the root of the guest."""
    source: Path | None
    """None: `content` is it."""
    content: bytes = b""

    def read(self) -> bytes:
        return self.content if self.source is None else self.source.read_bytes()


def files() -> list[OwnFile]:
    """All files of our part, sorted by place.

    Raises:
        NotSupported: protobuf runs without its compiled core here, so that there is none to copy.
    """
    return sorted([OwnFile(START_SCRIPT, None, _START.encode()), *_sandshift(), *_ttrpc(), *_protobuf()])


def digest(own: list[OwnFile]) -> str:
    """SHA-256 over every place and content, hex."""
    summed = hashlib.sha256()
    for file in own:
        content = file.read()
        summed.update(f"{file.place}\0{len(content)}\0".encode())
        summed.update(content)
    return summed.hexdigest()


def write(own: list[OwnFile], root: Path) -> None:
    for file in own:
        path = root / file.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read())
        path.chmod(0o755 if path.suffix == ".so" else 0o644)


def _sandshift() -> Iterator[OwnFile]:
    top = Path(sandshift.__file__).parent
    yield OwnFile(f"{PLACE}/sandshift/__init__.py", top / "__init__.py")
    for room in _ROOMS:
        yield from _python_files(top / room, f"{PLACE}/sandshift/{room}")


def _ttrpc() -> Iterator[OwnFile]:
    yield from (
        file
        for file in _python_files(Path(ttrpc.__file__).parent, f"{PLACE}/ttrpc")
        if "/codegen/" not in file.place
    )


def _protobuf() -> Iterator[OwnFile]:
    if api_implementation.Type() != "upb":
        raise NotSupported(
            "guest image: protobuf runs without its compiled core here: install protobuf's wheel for this CPU"
        )
    top = Path(google.protobuf.__file__).parent
    for file in _python_files(top, f"{PLACE}/google/protobuf"):
        if file.place.split("/")[4] not in _PROTOBUF_LEFT_OUT:
            yield file
    for library in sorted((top.parent / "_upb").glob("*.so")):
        yield OwnFile(f"{PLACE}/google/_upb/{library.name}", library)


def _python_files(folder: Path, place: str) -> Iterator[OwnFile]:
    for path in sorted(folder.rglob("*.py")):
        yield OwnFile(f"{place}/{path.relative_to(folder)}", path)
