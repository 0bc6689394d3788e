from lowbit_jax.reporting.metrics import MetricsFile, read_metrics, series


def test_rows_come_back_and_a_resume_drops_later_and_torn_ones(tmp_path):
    with MetricsFile(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.write({"step": step, "kind": "train", "loss": 0.1 * step})
        metrics.write({"step": 3, "kind": "eval", "nll": 7.0})
        metrics.sync()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')
    assert len(read_metrics(tmp_path)) == 4
    with MetricsFile(tmp_path, resume_step=2) as metrics:
        metrics.write({"step": 3, "kind": "train", "loss": 9.0})
    assert series(read_metrics(tmp_path), "train", "loss") == ([1, 2, 3], [0.1, 0.2, 9.0])
    assert series(read_metrics(tmp_path), "eval", "nll") == ([], [])


def test_a_row_is_readable_as_soon_as_it_is_written(tmp_path):
    with MetricsFile(tmp_path) as metrics:
        metrics.write({"step": 1, "kind": "train"})
        assert read_metrics(tmp_path) == [{"step": 1, "kind": "train"}]


def test_other_processes_write_nothing(tmp_path):
    with MetricsFile(tmp_path, keep=False) as metrics:
        metrics.write({"step": 1})
        metrics.sync()
    assert list(tmp_path.iterdir()) == []
    assert read_metrics(tmp_path) == []
