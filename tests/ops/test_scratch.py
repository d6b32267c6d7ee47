"""The room that matrices at work share on a CPU: right values, one piece of memory, never two users at once."""

from collections.abc import Iterator

import pytest
import torch

from fettle.ops.nf4 import Nf4, nf4_dequantize_reference, nf4_quantize
from fettle.ops.scratch import SHARED_BUFFER, dense_weights, scratch
from fettle.recompute.allocator import release_unused


@pytest.fixture(autouse=True)
def _empty_buffer() -> Iterator[None]:
    SHARED_BUFFER.release()
    yield
    SHARED_BUFFER.release()


def nf4(rows: int, seed: int = 0) -> Nf4:
    return nf4_quantize(torch.randn(rows, 192, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacked_matrices_are_the_reference(dtype: torch.dtype) -> None:
    weights = [nf4(5), nf4(64, seed=1)]
    with dense_weights(weights, dtype) as found:
        for weight, matrix in zip(weights, found, strict=True):
            assert torch.equal(matrix, nf4_dequantize_reference(weight, dtype))


def test_a_matrix_in_another_type_is_converted_and_one_in_the_same_is_itself() -> None:
    narrow, wide = torch.randn(7, 9).bfloat16(), torch.randn(3, 9)
    with dense_weights([narrow, wide], torch.float32) as (converted, same):
        assert torch.equal(converted, narrow.float())
        assert same.data_ptr() == wide.data_ptr()


def test_the_next_one_goes_where_the_one_before_was() -> None:
    with dense_weights([nf4(64)], torch.float32) as (first,):
        place = first.data_ptr()
    with dense_weights([nf4(32, seed=1)], torch.bfloat16) as (second,):
        assert second.data_ptr() == place


def test_one_asked_for_within_another_leaves_it_alone() -> None:
    outer_weight, inner_weight = nf4(64), nf4(64, seed=1)
    with dense_weights([outer_weight], torch.float32) as (outer,):
        with dense_weights([inner_weight], torch.float32) as (inner,):
            assert torch.equal(inner, nf4_dequantize_reference(inner_weight, torch.float32))
        assert torch.equal(outer, nf4_dequantize_reference(outer_weight, torch.float32))


def test_an_error_within_the_block_leaves_the_room_free() -> None:
    with pytest.raises(ZeroDivisionError), dense_weights([nf4(8)], torch.float32):
        raise ZeroDivisionError
    with dense_weights([nf4(8)], torch.float32) as (matrix,):
        assert SHARED_BUFFER.memory is not None and matrix.data_ptr() == SHARED_BUFFER.memory.data_ptr()


def test_its_memory_is_given_back_with_all_that_is_unused() -> None:
    with dense_weights([nf4(64)], torch.float32):
        release_unused()
        assert SHARED_BUFFER.memory is not None  # it is in use
    release_unused()
    assert SHARED_BUFFER.memory is None


def test_scratch_and_matrices_share_one_piece_of_memory() -> None:
    shapes = [torch.Size((800, 50)), torch.Size((3, 7))]  # the larger of the two users, or it would move
    with scratch(shapes, torch.float32, torch.device("cpu")) as found:
        assert [tensor.shape for tensor in found] == shapes
        place = found[0].data_ptr()
    with dense_weights([nf4(1)], torch.bfloat16) as (matrix,):
        assert matrix.data_ptr() == place


def test_memory_first_used_in_inference_serves_training() -> None:
    with torch.inference_mode(), dense_weights([nf4(64)], torch.float32):
        pass
    with scratch([torch.Size((4, 4))], torch.float32, torch.device("cpu")) as (found,):
        assert not found.fill_(1).is_inference()


def test_empty_shapes_take_no_memory():
    from fettle.ops.scratch import ScratchBuffer

    (empty,) = ScratchBuffer().carve([torch.Size((0, 8))], torch.float32)
    assert empty.shape == (0, 8)
