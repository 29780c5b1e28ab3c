"""Products that are written into a buffer, and added to it: what a GPU's kernels leave to PyTorch's GEMMs."""

from unittest.mock import patch

import pytest
import torch

from cce_inductor.ops import gemm


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_a_product_into_a_part_of_a_buffer(dtype, out_dtype):
    torch.manual_seed(0)
    a, b = torch.randn(5, 7).to(dtype), torch.randn(9, 7).to(dtype).t()
    buffer = torch.full((5, 12), 3.0, dtype=out_dtype)
    exact = a.double() @ b.double()
    gemm.MM(buffer[:, :9], a, b)
    digits = 1e-6 if out_dtype == torch.float32 else 2**-8
    torch.testing.assert_close(buffer[:, :9].double(), exact, rtol=digits, atol=digits)
    assert (buffer[:, 9:] == 3).all()
    gemm.ADD_MM(buffer[:, :9], a, b)
    torch.testing.assert_close(buffer[:, :9].double(), 2 * exact, rtol=2 * digits, atol=2 * digits)


def test_a_device_that_wants_the_sum_in_16_bits_adds_out_of_place():
    """As some versions of torch do: the error is caught, once for each device."""
    gemm._adds_to_float32.cache_clear()

    def refuses(*arguments, **options):
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    with patch.object(torch.ops.aten.addmm, "dtype_out", refuses):
        assert not gemm._adds_to_float32(torch.device("cpu"))
    gemm._adds_to_float32.cache_clear()
