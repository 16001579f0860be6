"""Which kernel modules the guest needs, and in which order they load. Works on an unpacked kernel package.

Distributions differ in what is built in, what is a module and how modules are compressed: all three are read from the
package, nothing is assumed.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sandshift.errors import NotSupported

WANTED: Final = (
    "virtio_pci",
    "virtio_console",
    "virtio_scsi",
    "sd_mod",
    "virtio_net",
    "virtio_rng",
    "erofs",
    "overlay",
)
"""What every sandbox needs before its agent answers."""

OPTIONAL: Final = ("qemu_fw_cfg", "vmgenid", "crc32c_intel", "virtio_blk")
"""Loaded where the kernel has them."""

_SUFFIX: Final = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    content: bytes
    """Uncompressed, as init_module takes it."""
    needs: tuple[str, ...]


class KernelTree:
    """The modules folder of one kernel: /lib/modules/RELEASE of its package."""

    def __init__(self, folder: Path) -> None:
        self._files = {
            _module_name(path): path for path in sorted(folder.rglob("*.ko*")) if _SUFFIX.search(path.name)
        }
        listed = (folder / "modules.builtin").read_text().split()
        self._built_in = {_module_name(Path(line)) for line in listed}
        self.release = folder.name

    def has(self, name: str) -> bool:
        return name in self._files or name in self._built_in

    def load_order(self, names: tuple[str, ...]) -> list[Module]:
        """`names` and all that they need, each after what it needs; what is built in is left out.

        Raises:
            NotSupported: this kernel has one of them neither as a module nor built in.
        """
        ordered: dict[str, Module] = {}
        for name in names:
            self._add(name, ordered)
        return list(ordered.values())

    def _add(self, name: str, ordered: dict[str, Module]) -> None:
        if name in ordered or (name in self._built_in and name not in self._files):
            return
        if name not in self._files:
            raise NotSupported(
                f"guest image: kernel {self.release} has no {name}: install another kernel package"
            )
        module = _read(name, self._files[name])
        for needed in module.needs:
            self._add(needed, ordered)
        ordered[name] = module


def _module_name(path: Path) -> str:
    return _SUFFIX.sub("", path.name).replace("-", "_")


def _read(name: str, path: Path) -> Module:
    content = _uncompressed(path)
    found = _DEPENDS.search(content)
    needs = found[1].decode().split(",") if found and found[1] else []
    return Module(name, content, tuple(needed.replace("-", "_") for needed in needs))


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        import gzip  # noqa: PLC0415  (rare)

        return gzip.decompress(data)
    if path.suffix == ".zst":
        if shutil.which("zstd") is None:
            raise NotSupported(
                "guest image: this kernel's modules are packed with zstd: apt-get install zstd"
            )
        return subprocess.run(["zstd", "-dcq", str(path)], capture_output=True, check=True).stdout
    return data
