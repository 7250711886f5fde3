import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

setup(
    name="dgunet",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "dgunet" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Deep Generalized Unfolding Networks for Image Restoration (CVPR 2022), reimplemented",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["dgunet"],
    python_requires=">=3.10",
    # What the modules of dgunet import themselves; what only some functions need they take from errors.optional.
    install_requires=["torch>=2.6", "numpy>=1.24", "natsort>=8", "psutil>=5.9", "PyYAML>=6", "yacs>=0.1.8"],
    extras_require={
        # the training and test commands of the task folders
        "train": [
            "torchvision>=0.21",
            "scipy>=1.11",
            "scikit-image>=0.22",
            "opencv-python-headless>=4.8",
            "pillow>=10",
            "kornia_rs>=0.2,<0.3",  # decodes PNG three times faster than OpenCV and Pillow
            "h5py>=3.9",
            "matplotlib>=3.8",
            "tqdm>=4.65",
            "filelock>=4",  # its locks are not inherited by loading processes
            "warmup-scheduler>=0.3",
        ],
        "data": ["gdown>=5.2"],  # scripts/download_data.py
        "tensorboard": ["tensorboard>=2.15"],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
