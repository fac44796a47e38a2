"""Fake devices and run-time checks of every shape annotation, before jax or the packages load."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

install_import_hook(["pallas_kernels", "msa_jax"], "beartype.beartype")
