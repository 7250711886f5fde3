"""Test DGUNet for compressive sensing: measure pictures and reconstruct them.

    python CompressiveSensing/test.py                                            # our own weights, ratio 25 %
    python CompressiveSensing/test.py --weights model.pth                        # the paper's table: Set11 and BSD68
    python CompressiveSensing/test.py --weights model.pth --dataset path/to/pictures --save_images
    python CompressiveSensing/test.py --weights model.pth --whole                # whole pictures, not 128x128 tiles
    python CompressiveSensing/test.py --score_only reconstructed                 # score reconstructed/Set11/...

PSNR and SSIM as the original's test script computes them: on the luminance of OpenCV, unrounded, 128x128 tiles that are
reconstructed separately. "input" in the table is x_0 = A_adjoint(y). A test that was interrupted goes on where it was.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sensing import reconstruct_tiles, reconstruct_whole

from dgunet.data import Pair, read_luma, write_image
from dgunet.errors import UserError, run_cli
from dgunet.evaluation import ScoreSheet, TestRun, TestSet, pictures, to_uint8

RATIOS = (1, 4, 10, 25, 50)  # percent


def paper(dgunet: list[tuple], plus: list[tuple]) -> dict[str, tuple[float, float]]:
    named = {"compressive_sensing_dgunet": dgunet, "compressive_sensing_dgunet_plus": plus}
    return {f"{name} {ratio}%": v for name, values in named.items() for ratio, v in zip(RATIOS, values, strict=True)}


TEST_SETS = {
    "Set11": TestSet(
        "Set11",
        "cs_y",
        paper(
            [(22.09, 0.6096), (26.84, 0.8249), (31.07, 0.9123), (36.11, 0.9611), (41.22, 0.9836)],
            [(22.15, 0.6114), (26.83, 0.8230), (30.93, 0.9088), (36.18, 0.9616), (41.24, 0.9837)],
        ),
    ),
    "BSD68": TestSet(
        "BSD68",
        "cs_y",
        paper(
            [(22.65, 0.5396), (25.55, 0.7008), (28.26, 0.8193), (31.90, 0.9155), (37.01, 0.9714)],
            [(22.70, 0.5406), (25.45, 0.6987), (28.14, 0.8165), (31.98, 0.9158), (37.04, 0.9718)],
        ),
    ),
}


class SensingRun(TestRun):
    """Every picture is its own target; restoring is measuring and reconstructing."""

    def add_arguments(self, add: Callable):
        add("--whole", action="store_true", help="reconstruct whole pictures, not tiles of 128x128")

    def options(self, dataset: str) -> dict:
        return dict(whole=self.args.whole)

    def paper_key(self) -> str:
        if self.model is None:
            return ""
        operator = self.model.degradation
        ratio = operator.matrix.shape[0] / operator.block**2
        percent = min(RATIOS, key=lambda r: abs(r / 100 - ratio))
        return f"{self.name} {percent}%" if abs(percent / 100 - ratio) < 0.001 else ""

    def items(self, dataset: str) -> list[Pair]:
        return [Pair(name, path, path) for name, path in pictures(self.find(dataset)).items()]

    def test_one(self, dataset: str, item: Pair, sheet: ScoreSheet, out: Path):
        luma = read_luma(item.target)
        if self.model is None:
            restored = initial = read_luma(self.restored_picture(dataset, item.name))
            if restored.shape != luma.shape:
                raise UserError(f"{item.name} in {self.args.score_only} has another size than its target")
        else:
            reconstruct = reconstruct_whole if self.args.whole else reconstruct_tiles
            restored, initial = reconstruct(self.model, luma, self.args.bf16)
            if self.writes(item, sheet):
                write_image(out / f"{item.name}.png", to_uint8(restored))
        sheet.add(item.name, restored, luma, initial)


def main():
    shipped = Path(__file__).parent / "pretrained_models/ratio25/weights.pth"
    SensingRun("compressive_sensing", __doc__, TEST_SETS, protocol="cs_y", shipped=shipped).run()


if __name__ == "__main__":
    run_cli(main)
