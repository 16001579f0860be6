"""The shim's command line, in Go's flag syntax as containerd writes it. Loads nothing: `start` is timed."""

from __future__ import annotations

FLAGS_WITH_VALUE = frozenset({"namespace", "address", "publish-binary", "id", "bundle", "socket"})
FLAGS_WITHOUT_VALUE = frozenset({"debug", "info", "v", "version", "headless"})
ACTIONS = frozenset({"start", "delete"})


class Arguments:
    """The command line, in Go's flag syntax: one dash or two, "-flag value" or "-flag=value", the action last."""

    __slots__ = (
        "action",
        "address",
        "bundle",
        "debug",
        "headless",
        "id",
        "info",
        "namespace",
        "publish_binary",
        "version",
    )

    def __init__(
        self,
        action: str = "",
        namespace: str = "default",
        id: str = "",  # noqa: A002 - containerd's name for it
        address: str = "",
        *,
        publish_binary: str = "",
        bundle: str = "",
        debug: bool = False,
        info: bool = False,
        version: bool = False,
        headless: bool = False,
    ) -> None:
        """`headless`: nobody asked for this start; a shim that `delete` brings back to finish a session."""
        self.action = action
        self.namespace = namespace
        self.id = id
        self.address = address
        self.publish_binary = publish_binary
        self.bundle = bundle
        self.debug = debug
        self.info = info
        self.version = version
        self.headless = headless

    def _values(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arguments) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"Arguments({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


def parse_arguments(argv: list[str]) -> Arguments:
    """Raises Rejected, naming the word that is not understood."""
    values: dict[str, str | bool] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            if word not in ACTIONS or "action" in values:
                raise _rejected(
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
            raise _rejected(f"{word!r} is not a flag of this shim")
    values.pop("socket", None)
    return Arguments(**values)  # type: ignore[arg-type]


def _rejected(message: str) -> Exception:
    from sandshift.errors import Rejected  # noqa: PLC0415 - loaded only where it is needed

    return Rejected(message)
