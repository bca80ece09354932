import torch

from nmcompile.pruning.selection import first_above, nearest, running_sums, total


def test_nearest_prefers_the_lower_of_two() -> None:
    allowed = torch.tensor([[True, False, True, False, True]] * 6 + [[False] * 5]).t()
    position = torch.tensor([0, 1, 2, 3, 4, 5, 2], dtype=torch.int32)
    chosen = nearest(allowed, position)
    assert [row.nonzero().flatten().tolist() for row in chosen.t()] == [[0], [0], [2], [2], [4], [4], []]


def test_first_above_is_strict_and_may_be_past_the_end() -> None:
    sums = running_sums(torch.tensor([1.0, 0.0, 2.0]).unsqueeze(1)).expand(3, 5)
    assert first_above(sums, torch.tensor([0.0, 0.5, 1.0, 2.9, 3.0])).tolist() == [0, 0, 2, 2, 3]


def test_sums_run_in_index_order() -> None:
    a = torch.tensor([1.0, 2.0**24, 1.0, 1.0, -(2.0**24)]).unsqueeze(1)
    assert running_sums(a)[:, 0].tolist() == [1.0, 2.0**24, 2.0**24, 2.0**24, 0.0]
    assert total(a).tolist() == [0.0]
