"""Revision 2691 as its own clients speak it: message types in a descriptor pool of their own, beside the head's.

Both revisions name their messages alike and give some of them other fields, so one pool cannot hold both. The types are
stated field by field, as contract section 1 lists them.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import any_pb2, duration_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool

import ttrpc

_MESSAGES: Final = {
    "CompatibilityInfo": "bytes data=1",
    "MemoryMigrationTransferThrottleParams": "bool skip_throttling=1, double throttling_scale=2",
    "MigrationCompressionSettings": "uint32 throttle_worker_count=1",
    "MigrationInitializeOptions": (
        "int32 memory_transport=1, .MemoryMigrationTransferThrottleParams memory_transfer_throttle_params=2, "
        ".MigrationCompressionSettings compression_settings=3, bool checksum_verification=4, "
        "bool perf_tracing_enabled=5, bool cancel_if_blackout_threshold_exceeds=6, bool prepare_memory_transfer_mode=7, "
        ".CompatibilityInfo compatibility_data=8"
    ),
    "PrepareAndExportSandboxRequest": "string session_id=1, .MigrationInitializeOptions init_options=2",
    "PrepareAndExportSandboxResponse": ".google.protobuf.Any config=1",
    "ImportSandboxRequest": "string session_id=1, .google.protobuf.Any config=2",
    "PrepareSandboxRequest": "string session_id=1, .MigrationInitializeOptions init_options=2",
    "CreateDuplicateSocketRequest": "string session_id=1, bytes protocol_info=2",
    "TransferSandboxRequest": "string session_id=1, .google.protobuf.Duration timeout=2",
    "TransferSandboxResponse": (
        "uint32 message_id=1, string event=2, string error=3, .google.protobuf.Timestamp start_time=4, "
        ".google.protobuf.Timestamp update_time=5"
    ),
    "FinalizeSandboxRequest": "string session_id=1, int32 action=2",
    "Empty": "",
}
"""Enums are numbers here: on the wire they are the same. An enum's names are not what a client sends."""
_SCALARS: Final = {
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
}


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="migration_2691.proto", syntax="proto3")
    file.dependency.extend(f"google/protobuf/{name}.proto" for name in ("any", "duration", "timestamp"))
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for declared in filter(None, fields.split(", ")):
            kind, _, rest = declared.partition(" ")
            field_name, _, number = rest.partition("=")
            field = message.field.add(
                name=field_name, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL
            )
            if kind in _SCALARS:
                field.type = _SCALARS[kind]
            else:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, kind
    return file


def _types() -> dict[str, Any]:
    pool = DescriptorPool()
    for module in (any_pb2, duration_pb2, timestamp_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.Add(_file())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in _MESSAGES}


TYPES: Final = _types()
"""Message name -> class, of revision 2691."""


def _unary(name: str, request: str, response: str = "Empty") -> ttrpc.Method[Any, Any]:
    return ttrpc.Method("Migration", name, ttrpc.Shape.UNARY, TYPES[request], TYPES[response])


EXPORT: Final = _unary(
    "PrepareAndExportSandbox", "PrepareAndExportSandboxRequest", "PrepareAndExportSandboxResponse"
)
IMPORT: Final = _unary("ImportSandbox", "ImportSandboxRequest")
PREPARE: Final = _unary("PrepareSandbox", "PrepareSandboxRequest")
SOCKET: Final = _unary("CreateDuplicateSocket", "CreateDuplicateSocketRequest")
FINALIZE: Final = _unary("FinalizeSandbox", "FinalizeSandboxRequest")
TRANSFER: Final[ttrpc.Method[Any, Any]] = ttrpc.Method(
    "Migration",
    "TransferSandbox",
    ttrpc.Shape.SERVER_STREAM,
    TYPES["TransferSandboxRequest"],
    TYPES["TransferSandboxResponse"],
)
