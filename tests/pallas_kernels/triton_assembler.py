"""Compiles functions with Triton kernels for a GPU that is not there, as far as machine code."""

import re
import subprocess
import tempfile
import zlib

import jax
import triton

from pallas_kernels.triton import Target, traced_for


def assemble(compute_capability, fn, *shapes):
    """What NVIDIA's assembler reports of each kernel that `fn` runs, by the kernel's name."""
    with traced_for(Target(compute_capability)):
        lowered = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",))
    calls = _kernel_calls(lowered.compiler_ir("stablehlo").operation)
    return dict(_assemble(compute_capability, _ptx(call)) for call in calls)


def spill_bytes(report):
    """Stored for want of registers."""
    return int(re.search(r"(\d+) bytes spill stores", report).group(1))


def _kernel_calls(operation):
    """The descriptions of kernel calls under an operation, which hold their PTX."""
    for block in (block for region in operation.regions for block in region.blocks):
        for inner in block.operations:
            attributes = inner.operation.attributes
            if "call_target_name" in attributes and "triton" in str(attributes["call_target_name"]):
                yield zlib.decompress(attributes["backend_config"].value_bytes)
            yield from _kernel_calls(inner.operation)


def _ptx(call):
    text = call[call.index(b".version") :]
    text = text[: re.search(rb"[^\t\n\r\x20-\x7e]", text).start()]
    return text[: text.rindex(b"}") + 1] + b"\n"


def _assemble(compute_capability, ptx):
    name = re.search(rb"\.entry (\w+)", ptx).group(1).decode()
    suffix = "a" if compute_capability == 90 else ""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = f"-arch=sm_{compute_capability}{suffix}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", arch, file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return name, done.stderr
