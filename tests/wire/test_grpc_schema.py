"""The service as code describes it: any other language finds the same names and numbers."""

from __future__ import annotations

from google.protobuf import descriptor_pool

from fedsplit.wire.grpc_schema import CONTROL, DATA_TAG, PACKETS, SERVICE, ChunkMessage


def test_both_methods_stream_chunks_both_ways() -> None:
    service = descriptor_pool.Default().FindServiceByName(SERVICE)
    assert {f"/{service.full_name}/{method.name}" for method in service.methods} == {PACKETS, CONTROL}
    for method in service.methods:
        assert method.client_streaming and method.server_streaming
        assert method.input_type.full_name == method.output_type.full_name == "fedsplit.Chunk"


def test_data_have_the_last_number_of_all_fields() -> None:
    """Data are written behind all other fields."""
    fields = ChunkMessage.DESCRIPTOR.fields
    assert max(fields, key=lambda field: field.number).name == "data"
    assert ChunkMessage(data=b"x").SerializeToString().startswith(DATA_TAG)
