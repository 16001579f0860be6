"""ttrpc.codegen: what protoc writes with our plugin, imported and used."""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

import ttrpc
from sandshift.wire.migration import service_ttrpc
from tests.ttrpc.raw import abstract
from ttrpc.codegen import modules, stubs
from ttrpc.codegen.modules import Imports
from ttrpc.codegen.plugin import generate

ROOT = Path(__file__).resolve().parents[3]
PROTO = """
syntax = "proto3";
package gen.deep.v1;
import "gen_test/other-types.proto";
import "google/protobuf/empty.proto";

// Says hello, "in quotes" and with a back\\slash.
//
// Twice.
service Greeter {
  // One to one.
  rpc Greet(Hello) returns (Hello.Inner);
  rpc WatchIO(Hello) returns (stream google.protobuf.Empty);
  rpc Import(stream gen.other.Hello) returns (Hello);
  rpc Chat(stream Hello) returns (stream Hello);  // trailing "words"
}

service Empty {}

message Hello {
  string name = 1;
  message Inner { string name = 1; }
}
"""
OTHER = """
syntax = "proto3";
package gen.other;
message Hello { string name = 1; }
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("generated")
    source = folder / "protos" / "gen_test"
    source.mkdir(parents=True)
    (source / "main-file.proto").write_text(PROTO)
    (source / "other-types.proto").write_text(OTHER)
    out = folder / "out"
    out.mkdir()
    plugin = folder / "plugin"
    plugin.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ttrpc.codegen.plugin\n')
    plugin.chmod(0o755)
    protoc = Path(sys.executable).parent / "protoc"
    subprocess.run(
        [
            protoc,
            f"-I{folder / 'protos'}",
            f"--plugin=protoc-gen-ttrpc-python={plugin}",
            f"--python_out={out}",
            f"--ttrpc-python_out={out}",
            "gen_test/main-file.proto",
            "gen_test/other-types.proto",
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert not (out / "gen_test" / "other_types_ttrpc.py").exists()
    sys.path.insert(0, str(out))
    try:
        return importlib.import_module("gen_test.main_file_ttrpc")
    finally:
        sys.path.remove(str(out))


def test_the_examples_in_the_docstrings_are_right() -> None:
    assert doctest.testmod(stubs).failed + doctest.testmod(modules).failed == 0


def test_comments_of_the_proto_are_the_docstrings(generated: ModuleType) -> None:
    text = 'Says hello, "in quotes" and with a back\\slash.\n\nTwice.'
    assert inspect.getdoc(generated.GreeterClient) == text
    assert (
        inspect.getdoc(generated.GreeterService) == text + "\n\nWhat is not overridden answers UNIMPLEMENTED."
    )
    assert generated.GreeterClient.greet.__doc__ == "One to one."
    assert generated.GreeterService.chat.__doc__ == 'trailing "words"'
    assert generated.GreeterService.watch_io.__doc__ is None


def test_methods_have_their_names_shapes_and_types(generated: ModuleType) -> None:
    described = [
        (
            attribute,
            method.full_name,
            method.shape,
            method.request_type.DESCRIPTOR.full_name,
            method.response_type.DESCRIPTOR.full_name,
        )
        for method, attribute in generated.GreeterService.ttrpc_methods
    ]
    service, hello = "/gen.deep.v1.Greeter", "gen.deep.v1.Hello"
    assert described == [
        ("greet", f"{service}/Greet", ttrpc.Shape.UNARY, hello, f"{hello}.Inner"),
        ("watch_io", f"{service}/WatchIO", ttrpc.Shape.SERVER_STREAM, hello, "google.protobuf.Empty"),
        ("import_", f"{service}/Import", ttrpc.Shape.CLIENT_STREAM, "gen.other.Hello", hello),
        ("chat", f"{service}/Chat", ttrpc.Shape.BIDI, hello, hello),
    ]
    assert generated.EmptyService.ttrpc_methods == ()


async def test_generated_classes_speak_with_each_other(generated: ModuleType) -> None:
    pb = importlib.import_module("gen_test.main_file_pb2")
    other = importlib.import_module("gen_test.other_types_pb2")

    class Greeter(generated.GreeterService):  # type: ignore[name-defined,misc]
        async def greet(self, request, context):  # type: ignore[no-untyped-def]
            return pb.Hello.Inner(name=f"{request.name} {context.metadata['k']}")

        async def import_(self, requests, context):  # type: ignore[no-untyped-def]
            return pb.Hello(name=",".join([request.name async for request in requests]))

        async def chat(self, requests, context):  # type: ignore[no-untyped-def]
            async for request in requests:
                yield request

    server, address = ttrpc.Server(), abstract()
    server.register(Greeter())
    task = asyncio.create_task(server.serve(ttrpc.listen(address)))
    async with await ttrpc.connect(address) as connection:
        client = generated.GreeterClient(connection)
        assert (await client.greet(pb.Hello(name="you"), timeout_s=5, metadata={"k": "v"})).name == "you v"
        stream = client.import_()
        await stream.send(other.Hello(name="a"))
        assert (await stream.response()).name == "a"
        async with client.chat() as chat:
            await chat.send(pb.Hello(name="b"))
            assert (await anext(chat)).name == "b"
        with pytest.raises(ttrpc.StatusError, match="UNIMPLEMENTED: method WatchIO"):
            await anext(client.watch_io(pb.Hello()))
    await server.shutdown()
    await task


def test_the_wire_name_of_a_service_without_a_package_is_its_bare_name() -> None:
    names = {method.service for method, _ in service_ttrpc.MigrationService.ttrpc_methods}
    assert names == {"Migration"}


def refused(*methods: str) -> str:
    file = FileDescriptorProto(name="x.proto", package="p")
    file.message_type.add(name="M")
    service = file.service.add(name="S")
    for method in methods:
        service.method.add(name=method, input_type=".p.M", output_type=".p.M")
    response = generate(CodeGeneratorRequest(file_to_generate=["x.proto"], proto_file=[file]))
    assert list(response.file) == []
    return response.error


def test_methods_that_would_be_one_in_python_are_refused() -> None:
    assert (
        refused("CloseIO", "CloseIo") == "p.S: the methods CloseIO and CloseIo are both close_io() in Python"
    )
    assert "which is taken" in refused("TtrpcMethods")


def test_a_type_that_python_cannot_import_is_refused() -> None:
    file = FileDescriptorProto(name="x/import.proto", package="p")
    file.message_type.add(name="class")
    file.service.add(name="S").method.add(name="A", input_type=".p.class", output_type=".p.class")
    response = generate(CodeGeneratorRequest(file_to_generate=["x/import.proto"], proto_file=[file]))
    assert response.error == "p.class: 'class' is a word of Python and cannot be imported by name"


def test_modules_of_the_same_name_get_names_of_their_own() -> None:
    imports = Imports(["a.x_pb2", "b.c.x_pb2", "y_pb2", "a.x_pb2"])
    assert imports.lines() == ["from a import x_pb2", "from b.c import x_pb2 as b_c_x__pb2", "import y_pb2"]
    assert imports.reference(("b.c.x_pb2", "M.N")) == "b_c_x__pb2.M.N"


def test_what_is_generated_is_valid_whatever_the_comment_says() -> None:
    file = FileDescriptorProto(name="x.proto")
    file.message_type.add(name="M")
    file.service.add(name="S").method.add(name="A", input_type=".M", output_type=".M")
    file.source_code_info.location.add(path=[6, 0], leading_comments=' Ends """ badly \\ here"\n and "')
    (made,) = generate(CodeGeneratorRequest(file_to_generate=["x.proto"], proto_file=[file])).file
    classes = [node for node in ast.parse(made.content).body if isinstance(node, ast.ClassDef)]
    assert ast.get_docstring(classes[1]) == 'Ends """ badly \\ here"\nand "'
