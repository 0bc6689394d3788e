"""kill -9 at random moments while saving: the last or the previous checkpoint is always whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb

# Saves content after content to one path, and says before and after which. It imports once and
# forks for every life, before any backend or thread is started.
PROGRAM = """
import os, sys
import jax, numpy as np
from flax import nnx
import lowbit_jax as lb

def live(path, template, start):
    model = lb.checkpoint.load(template)
    graphdef, state = nnx.split(model)
    for turn in range(start, start + 10_000):
        rng = np.random.default_rng(turn)
        content = jax.tree.map(
            lambda x: jax.device_put(rng.integers(0, 99, x.shape).astype(x.dtype)), state
        )
        print("begin", turn, flush=True)
        lb.checkpoint.save(
            path, nnx.merge(graphdef, content), metadata={"turn": turn}, overwrite=True
        )
        print("done", turn, flush=True)

for line in sys.stdin:
    path, template, start = line.split()
    child = os.fork()
    if child == 0:
        live(path, template, int(start))
    print("child", child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.fixture
def nursery():
    """A process that starts others, which save until they are killed."""
    with subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    ) as process:
        yield process
        process.kill()


def one_life(nursery, path, template, start, seconds):
    """Lets a process save from content `start` on, kills it; returns what it said, in order."""
    nursery.stdin.write(f"{path} {template} {start}\n")
    nursery.stdin.flush()
    said = []
    child = None
    while child is None or not said:
        words = nursery.stdout.readline().split()
        if words[0] == "child":
            child = int(words[1])
        else:
            said.append((words[0], int(words[1])))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    while (words := nursery.stdout.readline().split()) != ["dead"]:
        said.append((words[0], int(words[1])))
    return said


def killed_while_saving(nursery, path, template, kills, rng):
    """Kills as often; returns in how many a save was under way."""
    committed, start, midway = None, 0, 0
    for _ in range(kills):
        said = one_life(nursery, path, template, start, rng.uniform(0, 0.6))
        done = [turn for word, turn in said if word == "done"]
        committed = done[-1] if done else committed
        last = said[-1][1]
        midway += said[-1][0] == "begin"
        start = last + 1
        if not (path / "manifest.json").exists():
            assert committed is None, "a checkpoint that was there is gone"
            continue
        turn = lb.checkpoint.read_manifest(path)["metadata"]["turn"]
        # The one that was begun may have been committed just before the kill.
        assert turn in {committed, last}
        loaded = lb.checkpoint.load(path, verify=True)
        content = np.random.default_rng(turn)
        for x in jax.tree.leaves(nnx.state(loaded)):
            np.testing.assert_array_equal(x, content.integers(0, 99, x.shape).astype(x.dtype))
        committed = turn
    return midway


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, marks=pytest.mark.slow)], ids=["3 times", "50 times"]
)
def test_killed_while_saving_the_last_or_the_previous_is_whole(kills, nursery, saved, tmp_path):
    rng = random.Random(os.environ.get("LOWBIT_KILL_SEED", "0"))
    midway = killed_while_saving(nursery, tmp_path / "c", saved, kills, rng)
    print(json.dumps({"kills": kills, "while a save was under way": midway}))
    assert midway or kills < 50
