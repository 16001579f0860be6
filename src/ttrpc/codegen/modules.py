"""Where protoc's Python output puts the class of a message, and under which name generated code imports it. Pure."""

from __future__ import annotations

import keyword
from collections.abc import Iterable

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto


class CannotGenerate(Exception):
    """The proto file has something that Python code cannot be made of; the message says what and where."""


def module_path(proto_name: str, suffix: str) -> str:
    """The file that is generated for a proto file.

    >>> module_path("google/my-thing.proto", "_pb2")
    'google/my_thing_pb2.py'
    """
    return proto_name.removesuffix(".proto").replace("-", "_") + suffix + ".py"


class Types:
    """Every message of the proto files that protoc has read, by full name."""

    def __init__(self, files: Iterable[FileDescriptorProto]) -> None:
        self._places: dict[str, tuple[str, str]] = {}
        for file in files:
            package = f".{file.package}" if file.package else ""
            module = module_path(file.name, "_pb2").removesuffix(".py").replace("/", ".")
            self._add(file.message_type, package, module, "")

    def _add(self, messages: Iterable[DescriptorProto], scope: str, module: str, outer: str) -> None:
        for message in messages:
            self._places[f"{scope}.{message.name}"] = module, outer + message.name
            self._add(message.nested_type, f"{scope}.{message.name}", module, f"{outer}{message.name}.")

    def place(self, full_name: str) -> tuple[str, str]:
        """Module and attribute of a message that is named as protoc names it (".package.Message").

        Raises:
            CannotGenerate: the name of its module or class is a word of Python.
        """
        module, attribute = self._places[full_name]
        for part in (*module.split("."), *attribute.split(".")):
            if keyword.iskeyword(part):
                raise CannotGenerate(
                    f"{full_name.lstrip('.')}: {part!r} is a word of Python and cannot be imported by name"
                )
        return module, attribute


class Imports:
    """The imports of one generated module: short names where they are unambiguous."""

    def __init__(self, modules: Iterable[str]) -> None:
        self._aliases: dict[str, str] = {}
        taken: set[str] = set()
        for module in sorted(set(modules)):
            alias = module.rpartition(".")[2]
            if alias in taken:
                alias = module.replace("_", "__").replace(".", "_")
            taken.add(alias)
            self._aliases[module] = alias

    def reference(self, place: tuple[str, str]) -> str:
        return f"{self._aliases[place[0]]}.{place[1]}"

    def lines(self) -> list[str]:
        lines = []
        for module, alias in self._aliases.items():
            package, _, name = module.rpartition(".")
            statement = f"from {package} import {name}" if package else f"import {name}"
            lines.append(statement if alias == name else f"{statement} as {alias}")
        return lines
