"""protoc-gen-ttrpc-python: writes `x_ttrpc.py` beside the `x_pb2.py` of every proto file that has a service.

    protoc --python_out=OUT --ttrpc-python_out=OUT x.proto

Reads a CodeGeneratorRequest on stdin and writes the response on stdout, as protoc wants it. What is wrong with a proto file
comes out as the response's error, which protoc prints.
"""

from __future__ import annotations

import sys

from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
from google.protobuf.descriptor_pb2 import Edition

from ttrpc.codegen.modules import CannotGenerate, Types, module_path
from ttrpc.codegen.stubs import module_source


def generate(request: CodeGeneratorRequest) -> CodeGeneratorResponse:
    """The files for a request of protoc."""
    response = CodeGeneratorResponse(
        supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL
        | CodeGeneratorResponse.FEATURE_SUPPORTS_EDITIONS,
        minimum_edition=Edition.EDITION_PROTO2,
        maximum_edition=Edition.EDITION_2023,
    )
    types = Types(request.proto_file)
    wanted = set(request.file_to_generate)
    try:
        for file in request.proto_file:
            if file.name in wanted and file.service:
                content = module_source(file, types)
                response.file.add(name=module_path(file.name, "_ttrpc"), content=content)
    except CannotGenerate as error:
        del response.file[:]
        response.error = str(error)
    return response


def main() -> None:
    """The console script."""
    request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
    sys.stdout.buffer.write(generate(request).SerializeToString())


if __name__ == "__main__":
    main()
