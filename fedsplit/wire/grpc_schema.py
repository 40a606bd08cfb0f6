"""The gRPC service `fedsplit.Trunk`, described in code: reflection works, and no build step needs protoc.

Both methods carry chunks in both directions. `fedsplit.wire.chunks` says what the chunks mean.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "fedsplit.Trunk"
PACKETS = f"/{SERVICE}/Packets"
CONTROL = f"/{SERVICE}/Control"

_Field = descriptor_pb2.FieldDescriptorProto
_FIELDS = (
    ("sequence", _Field.TYPE_UINT64),
    ("total", _Field.TYPE_UINT64),
    ("credit", _Field.TYPE_UINT64),
    ("most", _Field.TYPE_UINT64),
    ("data", _Field.TYPE_BYTES),
)
"""Fields of a chunk, numbered from 1."""

DATA_TAG = bytes([len(_FIELDS) << 3 | 2])
"""First byte of the field `data` in a message: the number of the field, and 2 for a field with a length."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    """Returns the description that a file `trunk.proto` would have."""
    file = descriptor_pb2.FileDescriptorProto(name="fedsplit/trunk.proto", package="fedsplit", syntax="proto3")
    chunk = file.message_type.add(name="Chunk")
    for number, (name, kind) in enumerate(_FIELDS, start=1):
        chunk.field.add(name=name, number=number, type=kind, label=_Field.LABEL_OPTIONAL)
    service = file.service.add(name="Trunk")
    for method in ("Packets", "Control"):
        service.method.add(
            name=method,
            input_type=".fedsplit.Chunk",
            output_type=".fedsplit.Chunk",
            client_streaming=True,
            server_streaming=True,
        )
    return file


def _message_class() -> Any:
    """Returns protobuf's class for a chunk, whose fields no type checker knows."""
    pool = descriptor_pool.Default()  # reflection looks here
    pool.AddSerializedFile(_file().SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fedsplit.Chunk"))


ChunkMessage: Any = _message_class()
"""Protobuf's class for a chunk."""
