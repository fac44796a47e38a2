"""The compile checker: how it reads schedules and compiled text, what it prints and writes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from experiments import cli, compile_check
from experiments.compiling import page, processes, trips
from experiments.compiling.bundles import Schedule, Section, read_schedule
from experiments.compiling.dumps import dumping_to, read_dump
from experiments.compiling.hlo import plain_name, read_hlo
from experiments.compiling.machines import MACHINES
from experiments.compiling.programs import Shape, parse_shape
from experiments.compiling.targets import parse_target
from experiments.compiling.timing import Expected, kernel_timing
from msa_jax.config import ConfigError

V5P = MACHINES["v5p"]
NONE = "0 0 0"
PRODUCT = "1 0 0"

# Two loops, the first of a number of trips that the data decide and with a branch that a delay of
# four bundles follows; what is in the bundles besides is left away.
BUNDLES = [
    ("0   :  { %s1_s1 = smov 0 }", NONE),
    ("0x1 LB: > { %s2_s1 = sphi %s1_s1, %s3_s1 } /* Start region 7 */", NONE),
    ("0x2   : > { %4 = vmatmul.bf16.gmra.mxu0 %v1 ;; %5 = vmatmul.bf16.gmra.mxu1 %v1 }", "2 1 0"),
    ("0x3   : > { %6 = sbr.rel (%p9_p1) target = $region8 }", NONE),
    *[(f"0x{n}   : > {{}}", NONE) for n in range(4, 8)],
    ("0x8   : > { %7 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s4, /*size_in_granules=*/64 }", NONE),
    ("0x9 PF: > { %8 = vmatmul.bf16.gmra.mxu0 %v2 }", PRODUCT),
    ("0xa   : > { %p5_p0 = scmp.ge.s32.totalorder %s3_s1, %s9_s9 }", NONE),
    ("0xb   :  { %9 = sbr.rel (!%p5_p0) target = $region7 }", NONE),
    *[(f"0x{n:x}   :  {{}}", NONE) for n in range(12, 16)],
    ("0x10   :  { %s10_s2 = smov (!%p5_p0), 2 }", NONE),
    ("0x11 LB: > { %s11_s2 = sphi %s10_s2, %s12_s2 /* phi copy */ } /* Start region 20 */", NONE),
    ("0x12   : > { %s12_s2 = sadd.s32 1, %s11_s2 ;; %v3 = vld [vmem:[#a_spill]] }", "0 1 1"),
    ("0x13   : > { %p6_p0 = scmp.ge.s32.totalorder %s12_s2, 7 /* loop exit test */ }", NONE),
    ("0x14   :  { %10 = sbr.rel (!%p6_p0) target = $region20 }", NONE),
    *[(f"0x{n:x}   :  {{}}", NONE) for n in range(21, 25)],
]
HEADER = "== CAPACITY:\nMXU, VALU, VLOAD:FILL\n4 4 3\n== UTILIZATION:\n"


@pytest.fixture
def schedule() -> Schedule:
    text = "= control target key start\nLB: loop body\n\n" + "\n".join(line for line, _ in BUNDLES)
    utilization = HEADER + "\n".join(row for _, row in BUNDLES)
    return read_schedule("kernel.1", text, utilization, V5P)


def test_a_schedule_is_a_tree_of_loops_and_branches(schedule):
    assert schedule.capacity == {"MXU": 4, "VALU": 4, "VLOAD:FILL": 3}
    sections = {section.path: section for section in schedule.root.walk()}
    assert list(sections) == ["", "Lm0", "Lm0.Bc0", "L0"]
    assert [s.trips for s in sections.values()] == [1, None, 1, 5]
    assert [s.bundles for s in sections.values()] == [2, 14, 1, 8]
    # Two products on the busiest MXU, of 16 rows each, one row per cycle.
    assert sections["Lm0"].product_cycles == 32
    assert sections["Lm0"].slots == {"MXU": 3, "VALU": 1, "VLOAD:FILL": 0}
    assert sections["Lm0.Bc0"].copied_bytes == 64 * 32
    assert sections["L0"].slots["VLOAD:FILL"] == 1


def test_branches_may_end_at_one_label():
    lines = [
        "0   :  { %1 = sbr.rel (%p1_p1) target = $region4 } /* Start region 1 */",
        *["0x1   :  {}"] * 4,
        "0x5   :  { %2 = sbr.rel (%p2_p2) target = $region7 } /* Start region 3 */",
        *["0x6   :  {}"] * 4,
        "0xa   :  { %v1 = vld [vmem:[%s1_s1]] } /* Start region 6 */",
        "0xb   :  {} /* End region 6 :: End region 3 */",
        "0xc PF:  { %3 = sbr.rel (%p3_p3) target = $region12 }",
        *["0xd   :  {}"] * 5,
        "0x12 PF:  {} /* End region 1 */",
    ]
    utilization = HEADER + "\n".join([NONE] * len(lines))
    root = read_schedule("kernel.1", "\n".join(lines), utilization, V5P).root
    # The first branch skips nine bundles, the second one two of them; the third has no known end.
    found = {section.path: section.bundles for section in root.walk()}
    assert found == {"": 11, "B0": 5, "B1": 2, "B2": 1}


def test_bundles_and_their_utilization_must_belong_together():
    with pytest.raises(ValueError, match=r"kernel.1: 1 bundles, utilization of 2"):
        read_schedule("kernel.1", BUNDLES[0][0], f"{HEADER}{NONE}\n{NONE}", V5P)


def test_time_is_cycles_of_sections_and_how_often_they_run(schedule):
    timing = kernel_timing(schedule, V5P, Expected({"Lm0": 3, "Lm0.Bc0": 0.5}))
    cycles = 2 + 3 * (32 + 0.5) + 5 * 8
    assert timing.schedule_ms == pytest.approx(1e3 * cycles / V5P.clock_hz)
    assert timing.occupancy["MXU"] == pytest.approx(3 * 32 / cycles)
    assert timing.occupancy["VALU"] == pytest.approx((3 + 5) / (4 * cycles))
    assert timing.bound == "MXU"
    # Both cores of a device copy.
    copied = 2 * 1.5 * 64 * 32
    assert timing.copy_ms == pytest.approx(1e3 * copied / V5P.chip.bytes_per_second)
    slow = kernel_timing(schedule, V5P, Expected({"Lm0": 3}, copied_bytes=1e9))
    assert (slow.bound, slow.milliseconds) == ("HBM", pytest.approx(1e12 / 2.76e12))


def test_a_loop_that_nobody_has_counted_gives_no_time(schedule):
    with pytest.raises(LookupError, match="how often loop Lm0 runs"):
        kernel_timing(schedule, V5P, Expected())


def test_branches_that_do_no_work_can_be_counted_together():
    known = Expected({"Lm0.B*": 0.25, "Lm0.B1": 0.5, "B*": 0})
    paths = "Lm0.B0", "Lm0.B1", "Lm0.Bc0", "Lm0.Bm0", "Lm0.L0.B0", "B0"
    sections = [Section(path, 1, 1, {}, 0, 0) for path in paths]
    assert [known.count(section) for section in sections] == [0.25, 0.5, 1, 1, 1, 0]


# The clock that is derived from the peak, in GHz, is that which the chips are known to have.
@pytest.mark.parametrize(
    ("chip", "clock"), [("v5e", 1.5), ("v5p", 1.75), ("v6e", 1.75), ("v7x", 2.19)]
)
def test_clocks(chip, clock):
    assert MACHINES[chip].clock_hz / 1e9 == pytest.approx(clock, rel=0.01)


MATMUL = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from pallas_kernels.ahead_of_time_tpu import compile_for_tpu

def multiply(a, b, o):
    def step(i, _):
        rows = pl.ds(pl.multiple_of(i * 256, 256), 256)
        product = jnp.dot(a[rows], b[...], preferred_element_type=jnp.float32)
        o[...] = jnp.maximum(o[...], product.reshape(32, 8, 512).max(0))
        return 0
    jax.lax.fori_loop(0, 3, step, 0)

for chip in sys.argv[1:]:
    call = pl.pallas_call(multiply, jax.ShapeDtypeStruct((8, 512), jnp.float32), name=chip)
    shapes = (768, 256), (256, 512)
    compile_for_tpu(call, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), chip=chip)
"""


def test_products_in_real_schedules_take_what_the_peak_says(tmp_path):
    command = [sys.executable, "-c", MATMUL, *MACHINES]
    subprocess.run(command, env=os.environ | dumping_to(tmp_path), check=True, capture_output=True)
    for chip, machine in MACHINES.items():
        schedule, vmem = read_dump(f"{chip}.1", tmp_path, machine)
        (loop,) = schedule.root.parts
        assert (loop.path, loop.trips) == ("Lm0", 3)
        flops = 2 * 256 * 256 * 512
        seconds = flops / (machine.chip.bf16_flops / machine.chip.num_cores)
        assert loop.product_cycles == pytest.approx(seconds * machine.clock_hz, rel=1e-3)
        assert loop.slots["MXU"] > 0
        assert vmem >= 8 * 512 * 4
        # A bundle is a cycle: it cannot fill more slots than there are.
        assert all(n <= schedule.capacity[u] * loop.bundles for u, n in loop.slots.items())


HLO = """HloModule jit_op

%body.1 (p: s32[]) -> s32[] {
  %scores.2 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %fusion.1 = f32[8]{0} fusion(%p), calls=%inner, backend_config={"estimated_cycles":"100"}
  ROOT %copy = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
}

%condition.1 (p: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%p, %limit), direction=LT
}

%endless.1 (p: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%p, %p), direction=NE
}

ENTRY %main.1 (p: s32[]) -> s32[] {
  %while.1 = s32[] while(%p), condition=%condition.1, body=%body.1
  %sort.1 = s32[] sort(%p), to_apply=%less, backend_config={"estimated_cycles":"7"}
  ROOT %attend.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_in_compiled_text_are_counted_with_the_loops_around_them():
    contents = read_hlo(HLO)
    assert contents.kernels == {"scores.2": 4, "attend.1": 1}
    assert contents.estimated_cycles == 4 * 100 + 7
    known = HLO.replace("body=%body.1", 'body=%body.1, x={"known_trip_count":{"n":"6"}}')
    assert read_hlo(known).kernels["scores.2"] == 6
    unknown = HLO.replace("condition=%condition.1", "condition=%endless.1")
    assert read_hlo(unknown).kernels["scores.2"] is None


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("select_blocks.1", "select_blocks"),
        ("transpose_jvp_sparse_attention_query_gradient__.12", "sparse_attention_query_gradient"),
    ],
)
def test_names_of_kernels(instruction, name):
    assert plain_name(instruction) == name


def test_neighbours_share_blocks_and_have_no_more_than_there_are():
    assert trips.distinct_blocks(Shape(2**17), 1) == 16
    assert trips.distinct_blocks(Shape(2**17), 8) == pytest.approx(16 + 2.03 * 7)
    assert trips.distinct_blocks(Shape(2**12), 8) == 16


def test_shapes_and_targets():
    assert parse_shape("1M,batch=2") == Shape(2**20, batch=2)
    assert parse_shape("") == Shape()
    assert parse_target("tpu-v7x:2x2x1").topology == "tpu7x:2x2x1"
    assert parse_target("h100").memory_bytes > 80e9


def run(arguments, capsys):
    code = cli.run(compile_check.main, ["compile_check", *arguments])
    return code, capsys.readouterr()


def test_an_operation_for_a_tpu(capsys, tmp_path):
    shape = "--shape=1K,num_heads=8,num_kv_heads=2,top_k=4"
    file = tmp_path / "record.json"
    arguments = ["--target=tpu-v5p", "--op=sparse_attention", "--implementation=mosaic_tpu"]
    code, printed = run([*arguments, shape, f"--json={file}"], capsys)
    assert (code, printed.err) == (0, "")
    assert "sparse_attention for tpu-v5p" in printed.out
    assert "of 102.0: fits" in printed.out
    assert "sparse_attention_forward.1, 1 x: " in printed.out
    written = json.loads(file.read_text())
    assert set(written["environment"]["packages"]) == {"jax", "libtpu"}
    (record,) = written["records"]
    (kernel,) = record["kernels"]
    assert kernel["ms"] == max(kernel["schedule_ms"], kernel["copy_ms"]) > record["floor_mxu_ms"]
    assert 0 < kernel["occupancy"]["MXU"] < 1
    assert kernel["vmem_bytes"] > 2 * 2 * 128 * 128


def test_what_is_wrong_with_an_order_is_in_its_record(capsys):
    arguments = ["--target=tpu-v5e", "--op=sparse_attention", "--implementation=mosaic_tpu"]
    code, printed = run([*arguments, "--shape=1K,head_dim=96"], capsys)
    assert code == 1
    assert "NotImplementedError: the kernels take a head_dim of 64 or 128, not 96" in printed.out


def test_an_operation_for_a_gpu(capsys):
    arguments = ["--target=h100", "--op=select_blocks", "--shape=1K,num_kv_heads=1,num_heads=2"]
    code, printed = run(arguments, capsys)
    assert code == 0
    assert "block_scores_mosaic_gpu_kernel: " in printed.out
    assert " registers, 0 bytes spilled" in printed.out


def test_a_training_step_on_a_topology(capsys):
    sizes = {
        "model.num_layers": 1,
        "model.d_model": 32,
        "data.sequence_length": 32,
        "moe.num_experts": 2,
        "moe.expert_dim": 32,
    }
    overrides = [f"--config.{field}={size}" for field, size in sizes.items()]
    config = "--config=configs/quickstart.py:gqa"
    code, printed = run(["--target=tpu-v5e:2x2", config, *overrides], capsys)
    assert code == 0
    assert "sparse training step for tpu-v5e:2x2" in printed.out
    assert "of 17.2: fits" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target=tpu-v9", "--op=index_kl"], "--target=tpu-v9: choose from tpu-v5e"),
        (["--target=h100:8", "--op=index_kl"], "--target=h100:8: choose from"),
        (["--target=tpu-v5e:2x2", "--op=index_kl"], "an --op is compiled for one device"),
        (["--op=index_kl", "--shape=1K,heads=2"], "--shape=1K,heads=2: no field 'heads'"),
        (["--op=index_kl", "--shape=batch=x"], "'x' is not a number"),
        ([], "name either an operation, --op=select_blocks, or a --config"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    code, printed = run(arguments, capsys)
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_report_compiles_everything_and_writes_a_page(monkeypatch, tmp_path, capsys):
    kernel = {"name": "kernel.1", "runs": 2, "vmem_bytes": 2**20, "sections": [{"spills": 3}]}
    timed = {"ms": 4.0, "copy_ms": 1.0, "bound": "MXU", "occupancy": {"MXU": 0.75, "VALU": 0.2}}
    timed["floor_tiles_ms"] = 2.5
    figures = {
        "memory": {"temporaries": 5e9},
        "fits": True,
        "floor_mxu_ms": 5.0,
        "floor_hbm_ms": 1.0,
        "around_ms": 0.5,
        "seconds": 1.0,
    }

    def answers(orders, *, workers):
        for order in orders:
            if order["target"] == "tpu-v5e":
                yield order | {"error": "no | room"}
            elif order["target"] == "tpu-v6e":
                yield order | figures | {"kernels": [kernel | {"untimed": "nobody counted"}]}
            else:
                yield order | figures | {"kernels": [kernel | timed]}

    monkeypatch.setattr(processes, "run", answers)
    code, printed = run(["--report", "--lengths=32K,1M", f"--output={tmp_path}"], capsys)
    assert code == 1
    assert "select_blocks, 32K, tpu-v5e: no | room" in printed.err
    text = (tmp_path / "tpu-static.md").read_text()
    assert "**No TPU has run any of this.**" in text
    assert "python -m experiments.compile_check --report --lengths=32K,1M" in text
    assert "| 1M | v5p | 8 | 5 | 1 | 1.6 |\n" in text
    assert "| 1M | v5p | `kernel` | 4 | 1 | 2.5 | 1.6 | MXU | 75 | 20 | 1.0 | 3 |" in text
    assert "| 1M | v6e | `kernel` | - | - | - | - | nobody counted | - | - | 1.0 | 3 |" in text
    assert "| 32K | v5e | no / room |" in text
    assert "| 32K | v5p | forward | 0.5 | 5.00 | yes |" in text
    count = len(page.OPERATIONS) * (2 * len(MACHINES) + 1)
    assert len(json.loads((tmp_path / "tpu-static.json").read_text())["records"]) == count


def test_a_process_that_dies_is_an_error_of_its_order(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (record,) = processes.run([{"target": "h100"}], workers=1)
    assert record["error"].startswith("its process ended with exit code 1")


def test_a_length_is_a_number():
    with pytest.raises(ConfigError, match="'x' is not a number of tokens"):
        page.orders(["x"])
