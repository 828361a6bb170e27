import pytest
import torch

from tether import linalg
from tether.errors import NonFiniteError, RankTooLargeError


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_check_rank_accepts_one_to_the_shorter_side(shape):
    weight = torch.empty(shape)
    for rank in (1, 2, 3):
        linalg.check_rank(weight, rank)
    for rank in (-1, 0, 4, 5):
        message = rf"^rank {rank} is not between 1 and min\(shape\) 3 of matrix \({shape[0]}, "
        with pytest.raises(RankTooLargeError, match=message):
            linalg.check_rank(weight, rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_counts_and_places_bad_values(dtype):
    tensor = torch.randn(4, 5).to(dtype)
    linalg.check_finite(tensor, "fine")
    tensor[1, 2], tensor[3, 0] = torch.inf, torch.nan
    with pytest.raises(NonFiniteError, match=r"^here: 2 of 20 values .* first inf at \(1, 2\)"):
        linalg.check_finite(tensor, "here")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_pass_whose_sum_overflows_and_opposite_infinities_do_not(dtype):
    large = torch.full((2, 50), torch.finfo(dtype).max, dtype=dtype)
    linalg.check_finite(large, "w")
    large[0, 3], large[1, 4] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteError, match=r"w: 2 of 100 .* the first inf at \(0, 3\)"):
        linalg.check_finite(large, "w")
