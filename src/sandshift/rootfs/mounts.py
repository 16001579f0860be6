"""What a snapshotter hands over in Task.Create, read into what is to be done with it. Pure: looks at no file.

The forms, as seen with containerd 1.6 to 2.3:

    overlayfs   one `overlay`: lowerdir, upperdir, workdir                       merged, then packed
    native      one `bind` of a folder                                           packed
    blockfile   one `ext4` whose source is a file                                a disk as it is, writable
    erofs       `erofs` files, the topmost first, with or without an `ext4` file  disks as they are; the guest stacks them
                for changes, then a `format/.../overlay` that says how they stack

All else is refused by field, value and remedy. An option is one entry of the list: no text is ever joined with commas.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sandshift.errors import NoRoom, Rejected
from sandshift.identifiers import shown
from sandshift.rootfs.plan import EROFS, EXT4
from sandshift.sandbox.patching import Mount

MOUNTS_MAX: Final = 256
LAYERS_MAX: Final = 200
"""Of one overlay: what fits into the one page that mount(2) takes."""
SNAPSHOTTERS: Final = "use one of the snapshotters overlayfs, native, blockfile or erofs"

_FLAGS: Final[Mapping[str, frozenset[str]]] = {
    "overlay": frozenset({"ro", "rw", "userxattr", "volatile"}),
    "bind": frozenset({"ro", "rw", "bind", "rbind", "private", "rprivate", "slave", "rslave"}),
    EXT4: frozenset({"ro", "rw", "loop"}),
    EROFS: frozenset({"ro", "loop"}),
}
_OVERLAY_SETTINGS: Final = frozenset({"index", "metacopy", "redirect_dir", "xino", "nfs_export", "uuid"})
"""Of a writable overlay: how it keeps changes. What they mean for what can be read is in the files themselves."""
_PASSED_ON: Final = frozenset({"userxattr", "metacopy=on", "redirect_dir=on", "redirect_dir=follow"})
"""Options that say how the layers are to be read."""
_OVERLAY_TYPE: Final = re.compile(r"(?:format/|mkdir/){0,2}overlay")
_MKDIR: Final = re.compile(
    r"X-containerd\.mkdir\.path=\{\{ *mount +\d{1,3} *\}\}/(?:upper|work)(?::[0-7]{1,4})?(?::\d{1,9}){0,2}"
)
_STACK: Final = re.compile(r"\{\{ *(?:overlay +(\d{1,3}) +(\d{1,3})|mount +(\d{1,3})) *\}\}")
_PLACE: Final = re.compile(r"\{\{ *mount +(\d{1,3}) *\}\}/(upper|work)")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders of this host to be merged, if there are several, and packed."""

    lower: tuple[str, ...]
    """The topmost first; read-only."""
    upper: str = ""
    """Where the snapshotter would put changes: on top, if anything is in there."""
    options: tuple[str, ...] = ()
    """How overlay is to read them, sorted."""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A file that holds a whole file system."""

    path: str
    file_system: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """Files of read-only layers, the topmost first, and what takes the changes."""

    layers: tuple[str, ...]
    writable: str = ""
    """An ext4 file; empty: none is given."""
    upper: str = ""
    """A folder of this host that the snapshotter would put changes in."""
    read_only: bool = False


Recipe = Folders | BlockFile | LayerFiles


def read(mounts: Sequence[Mount]) -> Recipe:
    """What is to be done with `mounts`, of which there is at least one.

    Raises:
        Rejected: a type, source or option that we do not know, or that would lead elsewhere; names field, value, remedy.
        NoRoom: more mounts or layers than one root file system may have.
    """
    if len(mounts) > MOUNTS_MAX:
        raise NoRoom(f"rootfs has {len(mounts)} mounts: at most {MOUNTS_MAX} are allowed")
    for number, mount in enumerate(mounts):
        if mount.target not in ("", "/"):
            raise _refused(number, "target", mount.target, "it must be empty: the root is one file system")
    if len(mounts) == 1:
        return _read_one(mounts[0])
    return _read_layers(mounts)


def _read_one(mount: Mount) -> Recipe:
    match mount.type:
        case "overlay":
            return _overlay(0, mount)
        case "bind" | "rbind":
            _check_flags(0, mount, "bind")
            return Folders(lower=(_path(0, "source", mount.source),), read_only="ro" in mount.options)
        case "ext4":
            return BlockFile(_file(0, mount, EXT4), EXT4, read_only="ro" in mount.options)
        case "erofs":
            return LayerFiles((_file(0, mount, EROFS),), read_only=True)
    raise _unknown_type(0, mount)


def _overlay(number: int, mount: Mount) -> Folders:
    settings, options = _settings(number, mount)
    lower = tuple(_split(settings.get("lowerdir", "")))
    if not lower:
        raise _refused(number, "options", " ".join(mount.options), "an overlay needs lowerdir")
    if len(lower) > LAYERS_MAX:
        raise NoRoom(f"rootfs[{number}] has {len(lower)} layers: at most {LAYERS_MAX} are allowed")
    upper = settings.get("upperdir", "")
    return Folders(
        lower=tuple(_path(number, "options: lowerdir", path) for path in lower),
        upper=_path(number, "options: upperdir", upper) if upper else "",
        options=options,
        read_only=not upper,
    )


def _settings(number: int, mount: Mount) -> tuple[dict[str, str], tuple[str, ...]]:
    """An overlay's folders by name, and how it is to read them."""
    settings: dict[str, str] = {}
    passed_on = []
    for option in mount.options:
        name, has_value, value = option.partition("=")
        if "," in option:
            raise _refused(number, "options", option, "it holds a comma: one option per entry")
        if name in ("lowerdir", "upperdir", "workdir") and has_value:
            if name in settings:
                raise _refused(number, "options", option, f"{name} is given twice")
            settings[name] = value
        elif option in _FLAGS["overlay"] or (name in _OVERLAY_SETTINGS and has_value):
            passed_on += [option] if option in _PASSED_ON else []
        elif not _MKDIR.fullmatch(option):
            raise _refused(number, "options", option, f"this option of overlay is not known; {SNAPSHOTTERS}")
    return settings, tuple(sorted(passed_on))


def _split(lowerdir: str) -> list[str]:
    """A path may hold a colon as backslash and colon. Source: Documentation/filesystems/overlayfs."""
    return [re.sub(r"\\(.)", r"\1", part) for part in re.findall(r"(?:[^:\\]|\\.)+", lowerdir)]


def _read_layers(mounts: Sequence[Mount]) -> LayerFiles:
    *files, last = mounts
    for number, mount in enumerate(files):
        if mount.type not in (EROFS, EXT4):
            raise _unknown_type(number, mount)
    number = len(files)
    if not _OVERLAY_TYPE.fullmatch(last.type):
        raise _refused(
            number, "type", last.type, "several mounts must end in an overlay that says how they stack"
        )
    settings, _ = _settings(number, last)
    order = _stacked(number, settings.get("lowerdir", ""), len(files))
    for place in order:
        if files[place].type != EROFS:
            raise _refused(place, "type", files[place].type, "a layer below the changes must be erofs")
    writable, upper = _changes(number, settings, files)
    unused = set(range(len(files))) - set(order) - ({writable} if writable is not None else set())
    if unused:
        raise _refused(
            min(unused), "source", files[min(unused)].source, "no layer of the overlay is made of it"
        )
    return LayerFiles(
        layers=tuple(_file(place, files[place], EROFS) for place in order),
        writable=_file(writable, files[writable], EXT4) if writable is not None else "",
        upper=upper,
        read_only="upperdir" not in settings,
    )


def _stacked(number: int, lowerdir: str, count: int) -> list[int]:
    """Places in the list of mounts, the topmost layer's first. `{{ overlay A B }}` is A to B, up or down."""
    order: list[int] = []
    at = 0
    while found := _STACK.match(lowerdir, at):
        first, last, one = found.groups()
        begin, end = (int(one), int(one)) if one is not None else (int(first), int(last))
        if max(begin, end) >= count:
            break
        order += range(begin, end + 1) if begin <= end else range(begin, end - 1, -1)
        at = found.end()
        if at == len(lowerdir):
            if len(set(order)) == len(order):
                return order
            break
        if lowerdir[at] != ":":
            break
        at += 1
    raise _refused(
        number,
        "options: lowerdir",
        lowerdir,
        f'it must be made of "{{{{ overlay FIRST LAST }}}}" or "{{{{ mount N }}}}" over the {count} mounts before it, each '
        "used once",
    )


def _changes(number: int, settings: Mapping[str, str], files: Sequence[Mount]) -> tuple[int | None, str]:
    """Which of the mounts takes the changes, or which folder of this host would have."""
    upper, work = settings.get("upperdir", ""), settings.get("workdir", "")
    if not upper:
        return None, ""
    place = _PLACE.fullmatch(upper)
    if place is None:
        return None, _path(number, "options: upperdir", upper)
    if place[2] != "upper" or work.replace(" ", "") != upper.replace(" ", "").removesuffix("upper") + "work":
        raise _refused(number, "options: workdir", work, "changes must go to upper and work of one mount")
    writable = int(place[1])
    if writable >= len(files) or files[writable].type != EXT4 or "ro" in files[writable].options:
        raise _refused(
            number, "options: upperdir", upper, "it must be in a writable ext4 file of the mounts before it"
        )
    return writable, ""


def _file(number: int, mount: Mount, file_system: str) -> str:
    _check_flags(number, mount, file_system)
    return _path(number, "source", mount.source)


def _check_flags(number: int, mount: Mount, kind: str) -> None:
    for option in mount.options:
        if option in _FLAGS[kind]:
            continue
        if kind == EROFS and option.startswith("device="):
            raise _refused(
                number, "options", option, "let the erofs snapshotter hand over its layers unmerged"
            )
        raise _refused(number, "options", option, f"this option of {kind} is not known; {SNAPSHOTTERS}")


def _path(number: int, name: str, value: str) -> str:
    """A path that leads where it says: absolute, without "..", as it would be written by hand."""
    if not value.startswith("/") or value.startswith("//") or _UNPRINTABLE.search(value):
        raise _refused(number, name, value, "it must be an absolute path")
    if posixpath.normpath(value) != value:
        raise _refused(number, name, value, 'it must be a path without ".", ".." or doubled slashes')
    return value


def _unknown_type(number: int, mount: Mount) -> Rejected:
    if mount.source.startswith("/dev/"):
        return _refused(number, "source", mount.source, f"block devices are not handed on; {SNAPSHOTTERS}")
    return _refused(number, "type", mount.type, f"this type of mount is not known; {SNAPSHOTTERS}")


def _refused(number: int, name: str, value: str, remedy: str) -> Rejected:
    return Rejected(f"rootfs[{number}].{name} is {shown(value)}: {remedy}")
