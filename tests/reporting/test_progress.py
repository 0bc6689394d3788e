import io

import pytest
from rich.console import Console

from lowbit_jax.reporting import progress
from lowbit_jax.reporting.progress import TrainProgress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_come_at_most_every_ten_seconds(clock):
    console = Console(file=io.StringIO(), width=60)
    with TrainProgress(console, total=1000, tokens_per_step=100) as bar:
        for step in range(0, 1001, 100):
            bar.update(step, 2.5, 1000.0)
            bar.log(step, 2.5, 1000.0)
            clock[0] += 4.0
    lines = console.file.getvalue().splitlines()
    # 0, 300, 600, 900 by time, and the last step always.
    assert [line.split()[1] for line in lines] == [
        "0/1000",
        "300/1000",
        "600/1000",
        "900/1000",
        "1000/1000",
    ]
    # 700 steps of 100 tokens at 1,000 tokens/s.
    assert lines[1] == "step 300/1000  loss 2.500  1,000 tokens/s  1:10 left"


def test_a_terminal_shows_loss_and_speed_in_the_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with TrainProgress(console, total=10, tokens_per_step=8, start=2) as bar:
        bar.update(5, 1.25, 4321.0)
        bar.log(5, 1.25, 4321.0)
        bar.note("a note")
    shown = console.file.getvalue()
    assert "5/10" in shown
    assert "1.250" in shown
    assert "4,321" in shown
    assert "a note" in shown
    assert "step 5/10" not in shown
