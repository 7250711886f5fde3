#!/usr/bin/env bash
# From nothing to denoised photographs in a few minutes: sets up .venv, writes photographs with synthetic sensor noise,
# trains a small DGUNet on some (on the GPU where there is one), tests it on others, and shows what a network that comes
# with the repository does.
# Running it again continues where it stopped, or shows the results again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
python=.venv/bin/python
data=Datasets/demo/denoising
weights=checkpoints/denoising/quickstart/model_best.pth
results=results/quickstart

echo; echo "== 1/5  photographs and noise"
$python scripts/make_demo_data.py --task denoising
echo; echo "== 2/5  training"
$python Denoising/train.py --config configs/denoising/quickstart.yaml TRAINING.RESUME True
echo; echo "== 3/5  testing on photographs it has not seen"
$python Denoising/test.py --weights $weights --dataset $data/test --results $results --save_images
echo; echo "== 4/5  a picture: noisy, after each stage, restored, clean"
$python scripts/plot_stages.py --weights $weights --pair $data/test astronaut --crop 40 160 160 --out $results/stages.png
echo; echo "== 5/5  the network of Denoising/pretrained_models on Gaussian noise"
$python scripts/make_demo_data.py --task denoising --noise gaussian --sigma 25 --out ${data}_gaussian25
$python Denoising/test.py --dataset ${data}_gaussian25/test --results $results/pretrained --save_images

echo
summary() { tail -n 1 "$1/denoising.csv" | awk -F, -v name="$2" '{ printf "%s: noisy %.2f dB -> restored %.2f dB\n", name, $9, $7 }'; }
summary $results/pretrained "pretrained network"
summary $results "quickstart"
