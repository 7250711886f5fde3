#!/usr/bin/env bash
# From nothing to denoised photographs in a few minutes: sets up .venv, writes photographs with synthetic sensor noise,
# trains a small DGUNet on some (on the GPU where there is one), and tests it on others.
# Running it again continues where it stopped, or shows the results again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
python=.venv/bin/python
data=Datasets/demo/denoising
weights=checkpoints/denoising/quickstart/model_best.pth
results=results/quickstart

echo; echo "== 1/4  photographs and noise"
$python scripts/make_demo_data.py --task denoising
echo; echo "== 2/4  training"
$python Denoising/train.py --config configs/denoising/quickstart.yaml TRAINING.RESUME True
echo; echo "== 3/4  testing on photographs it has not seen"
$python Denoising/test.py --weights $weights --dataset $data/test --results $results --save_images
echo; echo "== 4/4  a picture: noisy, after each stage, restored, clean"
$python scripts/plot_stages.py --weights $weights --pair $data/test astronaut --crop 40 160 160 --out $results/stages.png

echo
tail -n 1 $results/denoising.csv | awk -F, '{ printf "quickstart: noisy %.2f dB -> restored %.2f dB\n", $9, $7 }'
