"""Matmul peaks by the names that devices give themselves, and MFU."""

import pytest

from msa_jax import utilisation


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_peak_flops(kind, peak):
    assert utilisation.peak_flops(kind) == peak


def test_mfu():
    assert utilisation.mfu(989e9, 500.0, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.25)
    assert utilisation.mfu(1e9, 500.0, "cpu", 1) is None
