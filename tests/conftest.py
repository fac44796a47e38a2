"""Fake devices and run-time checks of every shape annotation, before jax or the packages load."""

import gc

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

install_import_hook(["pallas_kernels", "msa_jax"], "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Kept to the end they take 5.6 GB, and half of the memory maps that Linux gives a process."""
    yield
    jax.clear_caches()
    gc.collect()
