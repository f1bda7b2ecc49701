"""Code that chooses the precision of its products itself."""

import pytest
import torch

from molegrad.ops.amp import exact_products, without_autocast

CPU = torch.device("cpu")


def product():
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_without_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert product() == torch.bfloat16
        assert without_autocast(product)() == torch.float32
        with pytest.raises(ZeroDivisionError):
            without_autocast(lambda: 1 / 0)()
        assert product() == torch.bfloat16


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_exact_products_leave_the_settings_as_they_were(precision):
    before = torch.get_float32_matmul_precision()
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        torch.set_float32_matmul_precision(precision)
        was = [setting.fp32_precision for setting in settings]
        assert ("tf32" in was) == (precision == "high")
        with torch.autocast("cpu", torch.bfloat16), exact_products(CPU):
            assert product() == torch.float32
            assert [setting.fp32_precision for setting in settings] == ["ieee"] * 2
        assert [setting.fp32_precision for setting in settings] == was
        with pytest.raises(ZeroDivisionError), exact_products(CPU):
            1 / 0  # noqa: B018
        assert [setting.fp32_precision for setting in settings] == was
    finally:
        torch.set_float32_matmul_precision(before)
