"""Operations on jagged tensors compared with the same operations row by row."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hapo_verl.protocol import jagged

LENGTHS = [3, 0, 5, 1]


def rows_of(dtype):
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.rand(length, generator=generator)).to(dtype) for length in LENGTHS]


def as_jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_row_sums_are_the_sums_of_the_rows(dtype):
    rows = rows_of(dtype)
    expected = torch.stack([row.sum() for row in rows])
    torch.testing.assert_close(jagged.row_sums(as_jagged(rows)), expected)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_sums_of_rows_make_no_tensor_as_large_as_the_tokens(dtype):
    values, offsets = torch.ones(1000).to(dtype), torch.tensor([0, 600, 1000])
    given = SimpleNamespace(values=lambda: values, offsets=lambda: offsets)
    with Largest() as largest:
        assert jagged.row_sums(given).tolist() == [600, 400]
    assert largest.elements < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_batch_without_rows_has_no_sums(dtype):
    empty = torch.nested.nested_tensor_from_jagged(torch.zeros(0, dtype=dtype), offsets=torch.tensor([0]))
    assert jagged.row_sums(empty).shape == (0,)


def test_a_rows_value_is_copied_to_the_tokens_that_train():
    masks = [torch.tensor(row) for row in ([1, 0, 1], [], [1, 1, 0, 0, 1], [1])]
    spread = jagged.spread(torch.tensor([0.5, 1.0, -2.0, 3.0]), as_jagged([mask.long() for mask in masks]))
    expected = [[0.5, 0, 0.5], [], [-2, -2, 0, 0, -2], [3]]
    assert [row.tolist() for row in spread.unbind()] == expected


KEEP = torch.tensor([True, False, True, False])


def test_kept_rows_are_selected_and_padded():
    rows = rows_of(torch.float32)
    kept = [rows[0], rows[2]]
    assert [row.tolist() for row in jagged.select(as_jagged(rows), KEEP).unbind()] == [row.tolist() for row in kept]
    assert torch.equal(jagged.padded(as_jagged(rows), KEEP), torch.nn.utils.rnn.pad_sequence(kept, batch_first=True))


def test_a_dropped_row_has_no_token_in_the_mask_and_the_given_mask_is_unchanged():
    given = as_jagged([torch.ones(length, dtype=torch.int64) for length in LENGTHS])
    dropped = jagged.without(given, KEEP)
    assert [row.tolist() for row in dropped.unbind()] == [[False] * 3, [], [False] * 5, [True]]
    assert given.values().all()


def test_replaced_rows_are_cut_to_their_lengths_and_the_others_are_unchanged():
    rows = rows_of(torch.float32)
    new = torch.arange(10.0).reshape(2, 5)
    replaced = jagged.with_rows(as_jagged(rows), KEEP, new).unbind()
    assert [row.tolist() for row in replaced] == [[0, 1, 2], [], [5, 6, 7, 8, 9], rows[3].tolist()]
