"""Matmul peaks of devices, and how much of one a run makes use of."""

# Dense bf16 matmul peak of one JAX device, FLOP/s, from the vendors' data sheets (without the 2:4
# sparsity that NVIDIA's headline figures include). The first fragment found in the device kind
# decides, so the narrower ones come first.
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself "TPU v5" or "TPU v5p"
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),  # a chip is two JAX devices
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak, in FLOP/s, of one JAX device, or None for a kind that is not known.

    Args:
      device_kind: `jax.devices()[0].device_kind`, such as "NVIDIA H100 80GB HBM3".
    """
    return next((peak for name, peak in _PEAK_FLOPS if name in device_kind), None)


def mfu(
    flops_per_token: float, tokens_per_second: float, device_kind: str, num_devices: int
) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None where the peak is unknown (a CPU, say).

    Args:
      flops_per_token: one of the two figures of `msa_jax.cost.training_flops_per_token`.
      tokens_per_second: of the whole run, all devices together.
      device_kind: `jax.devices()[0].device_kind`.
      num_devices: JAX devices of the run.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * num_devices)
