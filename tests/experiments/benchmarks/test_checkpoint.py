import mmap

import jax
from flax import nnx

from experiments.benchmarks import checkpoint

SHAPE = checkpoint.Shape(dim=128, ffn_dim=128, vocab=8)


def test_a_row_has_what_both_parts_measured(tmp_path, monkeypatch):
    parts = {"save": checkpoint._save, "load": checkpoint._load}
    monkeypatch.setattr(checkpoint, "_in_process", lambda part, job: parts[part](job))
    (row,) = checkpoint.measure(["w3a16_g128"], params=3e5, rounds=1, folder=tmp_path, shape=SHAPE)
    model = checkpoint.random_model("w3a16_g128", row.layers, SHAPE)
    assert row.layers == 3  # 7 * 128**2 parameters each
    assert row.bytes == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    assert 0 < row.copy_cached <= row.copy
    assert min(row.save, row.load, row.verified) > 0
    # Linux adds pages up in batches, so that a load this small may read as less than none.
    assert abs(row.memory) < 2**28
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"
    assert checkpoint.table([row]).splitlines()[-1].startswith("| w3a16_g128 | 3 | 0 |")


def test_sizes_of_the_process_are_bytes():
    before = checkpoint._status("VmRSS")
    with mmap.mmap(-1, 2**26) as held:  # from the system, where an allocator has pages left
        held.write(b"\x01" * len(held))
        # Batches of pages that Linux has not added up yet are far below 1 MB a thread.
        assert checkpoint._status("VmRSS") - before > len(held) - 2**23
        assert checkpoint._status("VmHWM") >= before + len(held) - 2**23
