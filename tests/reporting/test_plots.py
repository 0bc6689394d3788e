import numpy as np
import pytest
from matplotlib.figure import Figure

from lowbit_jax.reporting import plots
from lowbit_jax.reporting.plots import WeightSample, human_bytes


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def saving(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saving)
    return figures


def test_weights_show_the_share_of_each_code_up_to_five_levels(tmp_path, drawn):
    ternary = WeightSample("a", np.repeat([-1.2, 0.1, 0.9, 3.0], 25), np.array([-1.0, 0.0, 1.0]))
    int4 = WeightSample("b", np.linspace(-9, 9, 1000), np.arange(-8.0, 8.0))
    plain = WeightSample("c", np.linspace(-1, 1, 100), np.zeros(0))
    plots.plot_weights([ternary, int4, plain], tmp_path / "w.png", title="t")
    assert (tmp_path / "w.png").stat().st_size > 1000
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == ["a", "b", "c"]
    assert [text.get_text() for text in panels[0].texts] == ["25%", "25%", "50%"]
    assert [len(axes.texts) for axes in panels[1:]] == [0, 0]


def test_bins_never_mix_two_codes(tmp_path, drawn):
    weights = np.random.default_rng(0).normal(size=5000)
    grid = np.array([-1.0, 0.0, 1.0])
    plots.plot_weights([WeightSample("a", weights, grid)], tmp_path / "w.png", title="t")
    edges = np.array([bar.get_x() for bar in drawn[0].axes[0].patches])
    for cut in (-0.5, 0.5):
        assert np.any(np.isclose(edges, cut, atol=1e-12))


def test_loss_leaves_the_first_steep_steps_out_of_the_axis(tmp_path, drawn):
    rows = [{"step": s, "kind": "train", "loss": 2.0 + 8.0 * (s == 1)} for s in range(1, 101)]
    rows.append({"step": 50, "kind": "eval", "nll": 2.5})
    plots.plot_loss(rows, tmp_path / "deep" / "loss.png", title="t")
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 2.0 < 2.5 < high < 3.0


def test_a_run_without_rows_still_has_a_picture(tmp_path, drawn):
    plots.plot_loss([], tmp_path / "loss.png", title="t")
    assert len(drawn) == 1


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (3.2e6, "3.2 MB"), (7e12, "7e+03 GB")]
)
def test_bytes_are_read_easily(count, text):
    assert human_bytes(count) == text
