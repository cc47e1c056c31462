"""Products of float32 matrices on this CPU are computed in float32, by either library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llama_ds.model import cpu_products


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cpu_products.rounds_natively.cache_clear()
    yield
    cpu_products.rounds_natively.cache_clear()
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel", ""])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(("columns", "inner"), [(1, 256), (33, 17), (688, 256), (256, 4096)])
def test_products_of_all_kinds_are_in_float32(
    vendor: str, rows: int, columns: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y = x W^T, dx = dy W, dW = dy^T x alone, added to a buffer and batched, as a layer and its attention have them.

    Summed in float32 they are off by less than 1e-6 of sqrt(terms); rounded to bfloat16 by 2e-3.
    """
    monkeypatch.setattr(cpu_products, "cpu_vendor", lambda: vendor)
    cpu_products.choose_products()
    generator = torch.Generator().manual_seed(rows)
    x, w, grad = (
        torch.randn(*shape, generator=generator) for shape in ((rows, inner), (columns, inner), (rows, columns))
    )
    wide_x, wide_w, wide_grad = (t.double() for t in (x, w, grad))
    buffer = torch.ones_like(w)
    products = {
        "x W^T": (x @ w.t(), wide_x @ wide_w.t(), inner),
        "dy W": (grad @ w, wide_grad @ wide_w, columns),
        "dy^T x": (grad.t() @ x, wide_grad.t() @ wide_x, rows),
        "buffer + dy^T x": (buffer.addmm_(grad.t(), x), 1 + wide_grad.t() @ wide_x, rows),
        "batched": (torch.bmm(x[None], w.t()[None]), (wide_x @ wide_w.t())[None], inner),
        "vector": (w @ x[0], wide_w @ wide_x[0], inner),
    }
    for name, (got, want, terms) in products.items():
        assert (got - want).abs().max() < 1e-5 * terms**0.5, name


def test_a_processor_that_would_round_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "cpu_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(cpu_products, "exact", lambda: False)
    cpu_products.choose_products()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not cpu_products.onednn_multiplies()


def test_rounding_to_bfloat16_is_noticed() -> None:
    assert cpu_products.exact()
    assert not cpu_products.exact(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
