#!/usr/bin/env bash
# Every row of the README's table of results, from the weights in this repository.
#   bash scripts/reproduce.sh DATA
# DATA holds the folders Set11, BSD68 (grey pictures), CBSD68, Kodak24 (in colour), CC15 and Rain100L (input/ and target/; or
# test/Rain100L, where scripts/download_data.py puts it), and if it is there reds_small/test (input/ and target/). A run that
# was interrupted goes on where it was.
set -euo pipefail
folder() { find -L "$1" "$1/test" -maxdepth 1 -type d -iname "$2" -print -quit 2>/dev/null || true; }  # upper or lower case
for name in Set11 BSD68 CBSD68 Kodak24 CC15 Rain100L; do
    if [ $# != 1 ] || [ ! -d "$1" ] || [ -z "$(folder "$1" $name)" ]; then
        echo "usage: bash scripts/reproduce.sh DATA    (a folder with Set11/, BSD68/, CBSD68/, Kodak24/, CC15/ and Rain100L/)" >&2
        exit 2
    fi
done
data=$(cd "$1" && pwd)
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
python=.venv/bin/python
results=results/reproduce

for percent in 1 4 10 25 50; do
    weights=compressive_sensing_$percent
    $python CompressiveSensing/test.py --weights $weights --data_root "$data" --results $results
    $python CompressiveSensing/test.py --weights $weights --data_root "$data" --results $results/whole --dataset Set11 --whole
done
$python Denoising/test.py --data_root "$data" --results $results  # the Gaussian noise that its weights are for
$python Denoising/test.py --weights denoising_real --dataset CC15 --data_root "$data" --results $results
mkdir -p $results/data/test
ln -sfn "$(folder "$data" Rain100L)" $results/data/test/Rain100L
$python Deraining/test.py --dataset Rain100L --data_root $results/data --results $results
blurred=$results/data/CBSD68_blurred
$python scripts/make_demo_data.py --task deblurring --copies 1 --test_source "$(folder "$data" CBSD68)" --out $blurred
$python Deblurring/test.py --dataset $blurred/test --results $results
if [ -d "$data/reds_small/test" ]; then
    $python Deblurring/test.py --dataset "$data/reds_small/test" --results $results
fi

printf '\n%-24s %-20s %8s %8s %8s %8s %8s\n' weights "data set" pictures PSNR SSIM "input's" SSIM
for table in compressive_sensing whole/compressive_sensing denoising deraining deblurring; do
    awk -F, 'NR > 1 { set = $4 ($12 ~ /whole=True/ ? ", whole" : "")
                      if (!(($2, set) in row)) order[++count] = $2 SUBSEP set
                      row[$2, set] = sprintf("%-24s %-20s %8d %8.2f %8.4f %8.2f %8.4f", $2, set, $6, $7, $8, $9, $10) }
        END { for (k = 1; k <= count; k++) print row[order[k]] }' $results/$table.csv
done
