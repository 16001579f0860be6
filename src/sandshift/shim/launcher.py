"""The program that containerd starts: a few lines that begin with this very interpreter, isolated and without site.

What pip writes for an entry point starts with the environment's `python`, which reads its configuration, .pth files and
sitecustomize first: 20 ms or more of the 25 that `start` has, and files of the caller's that could change what runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import google.protobuf

import sandshift

NAME: Final = "containerd-shim-sandshift-v2"
SHEBANG_BYTES_MAX: Final = 255
"""Source: linux/binfmts.h, BINPRM_BUF_SIZE with its NUL."""


def launcher() -> str:
    """Its text, for this interpreter and the folders that this process imports from.

    Raises:
        ValueError: the interpreter's path is too long for the first line of a script.
    """
    shebang = f"#!{interpreter()} -IS"
    if len(os.fsencode(shebang)) > SHEBANG_BYTES_MAX or " " in interpreter():
        raise ValueError(f"{interpreter()} cannot stand in the first line of a script: move the installation")
    folders = [str(folder) for folder in folders_of_ours()]
    return "\n".join(
        [
            shebang,
            "import sys",
            f"sys.path[:0] = {folders!r}",
            "from sandshift.shim.bootstrap import main",
            "main()",
            "",
        ]
    )


def interpreter() -> str:
    """The real one: a virtual environment's is a link, and needs the `site` module to find its packages."""
    return os.path.realpath(sys.executable)


def folders_of_ours() -> list[Path]:
    """Where sandshift and the packages that it needs lie, each once."""
    # google is a namespace package: its parts lie in folders of their own.
    found = [Path(module.__file__ or "").resolve().parent.parent for module in (sandshift,)]
    found.append(Path(google.protobuf.__file__).resolve().parents[2])
    return list(dict.fromkeys(found))


def install(folder: Path) -> Path:
    """Write it into `folder`, in place of an older one; its path."""
    path = folder / NAME
    temporary = folder / f".{NAME}.{os.getpid()}"
    temporary.write_text(launcher())
    temporary.chmod(0o755)
    temporary.replace(path)
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{install(Path(sys.argv[1]))}\n")
