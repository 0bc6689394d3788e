"""Counts of compilers without a device: how they are read and judged; the job itself is slow."""

import importlib.util
import json
import subprocess
import sys

import pytest

from experiments import aot
from experiments.deviceless import cases, sass

BUDGETS = json.loads(aot._BUDGETS.read_text())["budgets"]
PTXAS = """ptxas info    : Function properties for kernel
    0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
# A loop of copies, one of products within a larger one, and the branch that every kernel ends with.
SASS = """
.L_x_0:
        /*0000*/ UTMALDG.2D [UR8], [UR4] ;
        /*0010*/ @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/ LDS.64 R2, [R0] ;
.L_x_2:
        /*0030*/ LOP3.LUT R4, R2, 0xf, RZ, 0xc0, !PT ;
        /*0040*/ HGMMA.64x8x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0050*/ HGMMA.64x8x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0060*/ @!UP1 BRA `(.L_x_2) ;
        /*0070*/ @P1 BRA `(.L_x_1) ;
        /*0080*/ EXIT ;
.L_x_3:
        /*0090*/ BRA `(.L_x_3);
"""


def test_the_inner_loop_is_the_shortest_around_the_tensor_core():
    assert sass.read(PTXAS, SASS) == sass.Code(spills=20, registers=168, tensor=2, loop=4)
    plain = "\n".join(line for line in SASS.splitlines() if "HGMMA" not in line)
    # Without the tensor core: the longest loop, of four instructions when the products are gone.
    assert sass.read(PTXAS, plain) == sass.Code(spills=20, registers=168, tensor=0, loop=4)
    with pytest.raises(ValueError, match="no spills or registers in it: 'words"):
        sass.read("words", SASS)


def test_a_verdict_names_what_is_wrong():
    base = {"device": "d", "name": "n", "config": "c", "tensor": True}
    good = base | {"count": 10.0, "spills": 0, "registers": 9, "gmma": 4}
    budgets = {"d": {"n; c": {"budget": 10, "aim": 8}}}
    rows = [
        good,
        good | {"count": 10.5},
        good | {"spills": 8},
        good | {"gmma": 0},
        good | {"name": "other"},
        base | {"error": "ValueError: no"},
    ]
    judged = aot.judge(rows, budgets)
    assert [row["verdict"] for row in judged] == [
        "ok",
        "over its budget of 10",
        "spills 8 bytes",
        "does not use the tensor core",
        "has no budget",
        "failed: ValueError: no",
    ]
    assert "| d | n | c | 10 | 10 | 8 | 9 | 0 | ok |" in aot.table(judged)


@pytest.mark.parametrize("device", sorted(cases.KINDS))
def test_every_case_has_a_budget_and_every_budget_a_case(device):
    names = [f"{case.name}; {case.config}" for case in cases.of(device)]
    assert len(names) == len(set(names))
    assert set(names) == set(BUDGETS[device])


@pytest.mark.slow
def test_every_kernel_is_within_its_budget(tmp_path):
    for module in ("nvidia", "libtpu"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; it comes with the extra [aot]")
    command = [sys.executable, "-m", "experiments.aot", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert (tmp_path / "aot.json").exists()
