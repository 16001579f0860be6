"""The shim's command line, in Go's flag syntax as containerd writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sandshift.errors import Rejected

FLAGS_WITH_VALUE: Final = frozenset({"namespace", "address", "publish-binary", "id", "bundle", "socket"})
FLAGS_WITHOUT_VALUE: Final = frozenset({"debug", "info", "v", "version", "headless"})
ACTIONS: Final = frozenset({"start", "delete"})


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line, in Go's flag syntax: one dash or two, "-flag value" or "-flag=value", the action last."""

    action: str = ""
    namespace: str = "default"
    id: str = ""
    address: str = ""
    publish_binary: str = ""
    bundle: str = ""
    debug: bool = False
    info: bool = False
    version: bool = False
    headless: bool = False
    """Nobody asked for this start: a shim that `delete` brings back to finish a session."""


def parse_arguments(argv: list[str]) -> Arguments:
    """Raises Rejected, naming the word that is not understood."""
    values: dict[str, str | bool] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            if word not in ACTIONS or "action" in values:
                raise Rejected(
                    f"{word!r} is not an action of this shim: use one of {', '.join(sorted(ACTIONS))}"
                )
            values["action"] = word
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        if name in FLAGS_WITHOUT_VALUE:
            values["version" if name == "v" else name] = True
        elif name in FLAGS_WITH_VALUE:
            values[name.replace("-", "_")] = value if has_value else next(words, "")
        else:
            raise Rejected(f"{word!r} is not a flag of this shim")
    values.pop("socket", None)
    return Arguments(**values)  # type: ignore[arg-type]
