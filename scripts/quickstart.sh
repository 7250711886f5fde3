#!/usr/bin/env bash
# Sets up .venv, restores photographs with the pretrained networks, then trains a small one (on a GPU if there is one) and
# tests it: some minutes on two cores, the first images in one. Running it again resumes it, or shows the results again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
python=.venv/bin/python
results=results/quickstart
report=()
visible=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${visible%%,*} # one GPU is plenty

# keep WHAT OUTPUT: save the output of plot_stages.py for the end, its image on a line of its own.
keep() {
    report+=("$1" "    ${2%, drawn in *}" "    ${2#*, drawn in }")
}

# shipped TITLE WEIGHTS TASK DATA OPTIONS: draw how a network of pretrained_models/ restores a photograph. DATA is the
# folder of test images that make_demo_data.py writes below Datasets/demo for TASK and OPTIONS.
shipped() {
    local title=$1 weights=$2 task=$3 data=Datasets/demo/$4 image output
    image=$results/$(basename "$weights").png
    shift 4
    echo; echo "$title ($weights)"
    $python scripts/make_demo_data.py --task "$task" --out "${data%/test*}" "$@" > /dev/null
    output=$($python scripts/plot_stages.py --weights "$weights/weights.safetensors" --pair "$data" cat --title "$title" \
        --out "$image")
    echo "$output"
    keep "$title, by the network in $weights" "$output"
}

echo; echo "== 1/3  what the networks that come with the repository do with a photograph"
shipped "Gaussian noise, sigma 25" Denoising/pretrained_models/gaussian \
    denoising denoising_gaussian25/test --noise gaussian --sigma 25
shipped "Compressive sensing: a quarter as many measurements as pixels" CompressiveSensing/pretrained_models/ratio25 \
    compressive_sensing compressive_sensing/test

echo; echo "== 2/3  training a small one for sensor noise, as of a camera at a high ISO setting"
data=Datasets/demo/denoising
weights=checkpoints/denoising/quickstart/model_best.pth
$python scripts/make_demo_data.py --task denoising
$python Denoising/train.py --config configs/denoising/quickstart.yaml TRAINING.RESUME auto

echo; echo "== 3/3  testing it on photographs it has not seen"
$python Denoising/test.py --weights $weights --dataset $data/test --results $results --save_images
output=$($python scripts/plot_stages.py --weights $weights --pair $data/test astronaut --crop 40 160 160 \
    --title "Sensor noise" --out $results/quickstart.png)
keep "Sensor noise, by the network trained just now, ${weights%/*}" "$output"

echo; echo "== images to open; dB are PSNR against the true image, before -> after, more is better"
printf '%s\n' "${report[@]}"
echo "Each is degraded in its own way: compare before with after, not one with another."
echo "The network trained just now on all its test photographs (their mean is the last line), restored whole:"
newest=$(ls -t "$results"/denoising/*/*/settings.json 2> /dev/null | head -n 1 || true) # of several weights' folders
printf '    %s\n' "$PWD/${newest%/*}"/*.png
echo "On images of your own: $python Denoising/test.py --dataset FOLDER, $python Denoising/test.py --help"
awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i }
    END { printf "quickstart: noisy %.2f dB -> restored %.2f dB\n", $column["input_psnr"], $column["psnr"] }' \
    $results/denoising.csv
