"""The benchmark compares like with like, and says what it found."""

import json
import sys
from pathlib import Path

import pytest
import torch

from dgunet import create_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark import Case, as_original, prepare  # noqa: E402


@pytest.mark.parametrize("variant", ["deblurring_dgunet", "deraining_dgunet"])
def test_baseline_computes_the_same(variant):
    torch.manual_seed(0)
    model = create_model(variant, width=8, growth=4, final_growth=4).double()
    y = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    expected = [x.detach() for x in model(y)]
    for found, x in zip(as_original(model)(y), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-6)


def test_direct_and_separable_ssim_agree():
    direct, separable = (prepare(Case("evaluate", "ssim", height=48, width=48, baseline=b))() for b in (True, False))
    assert 0.5 < direct < 1 and separable == pytest.approx(direct.item(), abs=1e-3)


def test_tables(run_command, tmp_path):
    """A size that does not fit fails alone; the rest is measured, and compared with the baseline."""
    options = ["--variants", "compressive_sensing_dgunet", "--sizes", "40x40", "--crop", "32", "--batch", "1"]
    command = [ROOT / "scripts/benchmark.py", "forward", "train", *options, "--runs", "1", "--device", "cpu"]
    done = run_command([*command, "--out", tmp_path / "out.json"])
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["matrix_peak"]["bfloat16"] > 1e9
    rows = {(row["section"], row["width"], row["name"]): row for row in content["rows"]}
    assert len(rows) == 3 + 4
    for (_, width, name), row in rows.items():
        if width == 40:
            assert not row["times"]
            continue
        baseline = rows[row["section"], width, "baseline"]
        assert row["speed_ratio"] == pytest.approx(baseline["seconds"] / row["seconds"])
        assert 0 < row["share_of_peak"] and name in done.stdout
