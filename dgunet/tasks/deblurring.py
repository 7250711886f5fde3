"""Motion deblurring."""

from dgunet.data.datasets import SaturationPatches
from dgunet.evaluation.cli import Benchmark, Evaluation, custom_folder
from dgunet.tasks import Task, own_variants
from dgunet.training.cli import KNOWN_DEGRADATION, Training, crop_options, measured_channels

TRAIN = """Train DGUNet for deblurring.

    dgunet train deblurring                                             # the paper's DGUNet on GoPro, every GPU here
    dgunet train deblurring --config dgunet_plus GPU "[0, 1]" OPTIM.BATCH_SIZE 8
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m dgunet train deblurring
    dgunet train deblurring TRAINING.RESUME True                        # continue where it stopped

--help_config explains the config keys.
"""

TEST = """Test DGUNet for motion deblurring, or deblur images.

    dgunet test deblurring --weights model.pth --dataset GoPro HIDE       # the paper's table
    dgunet test deblurring --weights model.pth --dataset RealBlur_J RealBlur_R
    dgunet test deblurring --weights model.pth --dataset path/to/folder   # pairs in input/ and target/, or images
    dgunet test deblurring --dataset path/to/folder                       # our own weights
    dgunet test deblurring --weights model.pth --degradation my_module:make --dataset path/to/clean/images
    dgunet test deblurring --score_only restored                          # score restored/GoPro/...

GoPro and HIDE: PSNR and SSIM of MATLAB on 8-bit RGB, SSIM over three dimensions. RealBlur: after alignment to the
target; an image that cannot be aligned is scored as it is, with a note. An interrupted test resumes.
"""


def saturation_patches(cfg, pairs) -> SaturationPatches:
    saturation = cfg.AUGMENT.SATURATION
    return SaturationPatches(pairs, saturation=saturation, **measured_channels(cfg), **crop_options(cfg))


TASK = Task(
    "deblurring",
    own_variants("deblurring"),
    training=Training(
        uses=("AUGMENT.SATURATION", *KNOWN_DEGRADATION),
        syntheses=("motion_blur",),
        make_train_set=saturation_patches,
    ),
    evaluation=Evaluation(
        benchmarks={
            "GoPro": Benchmark("GoPro/test", "rgb_matlab", dict(dgunet=(32.71, 0.960), dgunet_plus=(33.17, 0.963))),
            "HIDE": Benchmark("HIDE/test", "rgb_matlab", dict(dgunet=(30.96, 0.940), dgunet_plus=(31.40, 0.944))),
            "RealBlur_J": Benchmark("RealBlur_J/test", "realblur_aligned"),
            "RealBlur_R": Benchmark("RealBlur_R/test", "realblur_aligned"),
        },
        own=custom_folder("rgb_matlab"),
        default_weights="deblurring_motion",
        operators=True,
    ),
    train_help=TRAIN,
    test_help=TEST,
)
