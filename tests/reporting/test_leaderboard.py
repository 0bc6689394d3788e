import pytest

from lowbit_jax.reporting.compare import compare


def summary(method, scheme, bits, rise, **changes):
    return {
        "method": method,
        "scheme": scheme,
        "bits_per_weight": bits,
        "float": {"nll": 1.5, "ppl": 4.4817},
        "packed": {"nll": 1.5 + rise, "ppl": 4.5},
        "kl_per_token": rise * 1.1,
        "seconds": 12.34,
        "peak_memory_bytes": 5e8,
        "packed_bytes": 1234,
        "evaluation_tokens": 1000,
        "evaluation_sha256": "ab" * 32,
        "calibration_sha256": "cd" * 32,
    } | changes


def runs():
    return {
        "rtn4": summary("rtn", "w4", 4.2, 0.1),
        "gptq4": summary("gptq", "w4", 4.2, 0.05),
        "rtn2": summary("rtn", "w2", 2.2, 3.0),
        "gptq2": summary("gptq", "w2", 2.2, 2.0),
        "awq4": summary("awq", "w4", 4.2, 0.07),
    }


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_methods_stand_against_schemes_with_the_best_of_each_in_bold(tmp_path):
    text = compare(runs(), tmp_path / "out")
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert table[0] == ["method", "w4", "w2"]
    # By the mean ratio to the best of each scheme: gptq 1 and 1, awq 1.4, rtn 2 and 1.5.
    assert table[2:5] == [
        ["gptq", "**0.0500**", "**2.0000**"],
        ["awq", "0.0700", ""],
        ["rtn", "0.1000", "3.0000"],
    ]
    long = {row[0]: row for row in table[5:]}
    assert long["gptq4"][1:] == [
        *("gptq", "w4", "4.200", "1.5500", "+0.0500", "0.0550", "12.3", "500 MB", "1.23 kB")
    ]
    assert [row[0] for row in table[7:]] == ["gptq2", "rtn2", "gptq4", "awq4", "rtn4"]
    assert (tmp_path / "out" / "compare.md").read_text() == text
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_another_calibration_text_is_noted(tmp_path):
    both = runs() | {"odd": summary("hqq", "w4", 4.2, -0.001, calibration_sha256="ef" * 32)}
    assert "calibrated on 2 different texts" in compare(both, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation_sha256": "00" * 32}, r"different text \(evaluation_sha256: rtn4: abab"),
        ({"float": {"nll": 1.6}}, r"different models .* odd: 1\.60000 nats"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(runs() | {"odd": summary("hqq", "w4", 4.2, 0.1, **changes)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_and_quantized_runs_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="qat was trained, and rtn4 quantized after training"):
        compare(runs() | {"qat": {"recipe": "w1_58a8"}}, tmp_path)
