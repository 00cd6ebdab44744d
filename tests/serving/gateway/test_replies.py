"""Replies: bytes that parse as the message with its tensors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protos.vae.v1 import vae_pb2 as pb
from serving.errors import UnsupportedType
from serving.gateway.replies import Reply
from serving.tensors import to_message

TENSORS = st.sampled_from([np.dtype(name) for name in ("<f4", "u1", "<f2")]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=4, max_side=9))
)


@given(TENSORS, TENSORS, st.integers(0, 2**64 - 1), st.text("abc0", max_size=12))
def test_a_reply_parses_as_the_message_it_stands_for(
    mean: np.ndarray, latents: np.ndarray, seed: int, version: str
) -> None:
    """Every field, of any type and shape, is what protobuf's own serialisation would have carried."""
    message = pb.EncodeResponse(seed=seed, model_version=version)
    reply = Reply(message, mean=mean, latents=latents)
    expected = pb.EncodeResponse(
        mean=to_message(mean), latents=to_message(latents), seed=seed, model_version=version
    )
    assert pb.EncodeResponse.FromString(reply.SerializeToString()) == expected


@pytest.mark.parametrize("num_rows", [1, 127, 128, 16_383, 16_384, 300_000])
def test_lengths_of_any_size_are_written(num_rows: int) -> None:
    """Lengths that need one, two, three or four bytes."""
    values = np.arange(num_rows, dtype=np.uint8)
    reply = Reply(pb.DecodeResponse(model_version="v"), reconstruction=values)
    parsed = pb.DecodeResponse.FromString(reply.SerializeToString())
    assert parsed == pb.DecodeResponse(reconstruction=to_message(values), model_version="v")


def test_an_absent_tensor_is_absent() -> None:
    """None leaves the field unset."""
    reply = Reply(pb.SampleResponse(seed=1), samples=np.ones((1, 2), np.float32), latents=None)
    parsed = pb.SampleResponse.FromString(reply.SerializeToString())
    assert parsed.HasField("samples")
    assert not parsed.HasField("latents")


def test_views_and_big_endian_numbers_are_right() -> None:
    """A view with strides is sent as what it shows, and big-endian numbers as little-endian ones."""
    values = np.arange(24, dtype=">f4").reshape(4, 6)[:, ::2]
    reply = Reply(pb.DecodeResponse(), reconstruction=values)
    parsed = pb.DecodeResponse.FromString(reply.SerializeToString())
    assert np.array_equal(np.frombuffer(parsed.reconstruction.data, "<f4").reshape(4, 3), values)


def test_other_types_are_refused() -> None:
    """As in a message."""
    with pytest.raises(UnsupportedType, match="float64"):
        Reply(pb.DecodeResponse(), reconstruction=np.ones(2, np.float64))
