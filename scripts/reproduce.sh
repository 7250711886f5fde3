#!/usr/bin/env bash
# Every row of the README's table of results, from the weights in this repository.
#   bash scripts/reproduce.sh DATA
# DATA holds folders of these names, in lower case or not: Set11, BSD68, Set12 (grey images), CBSD68, Kodak24 (in colour);
# CC15, Nam25, Rain100L (input/ and target/; Rain100L also as test/Rain100L, where scripts/download_data.py puts it); Test100
# (as published, N.jpg with both halves); reds_small/test (input/ and target/). Missing sets are skipped and named.
# An interrupted run is resumed.
set -euo pipefail
folder() { find -L "$1" "$1/test" -maxdepth 1 -type d -iname "$2" -print -quit 2>/dev/null || true; }
missing=()
there() {  # whether DATA has a set; the missing ones are listed at the end
    [ -n "$(folder "$data" "$1")" ] && return
    [[ " ${missing[*]} " == *" $1 "* ]] || missing+=("$1")
    return 1
}
if [ $# != 1 ] || [ ! -d "$1" ]; then
    sed -n '3,8s/^# *//p' "$0" >&2
    exit 2
fi
data=$(cd "$1" && pwd)
for name in Set11 BSD68 Set12 CBSD68 Kodak24 CC15 Nam25 Rain100L Test100 reds_small; do
    there $name || true
done
if [ ${#missing[@]} = 10 ]; then
    echo "$1 has none of the test sets: ${missing[*]}" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
python=.venv/bin/python
results=results/reproduce

for percent in 1 4 10 25 50; do
    sensing=($python CompressiveSensing/test.py --weights compressive_sensing_$percent --data_root "$data")
    for name in Set11 BSD68; do
        if there $name; then
            "${sensing[@]}" --results $results --dataset $name
        fi
    done
    if there Set11; then
        "${sensing[@]}" --results $results/whole --dataset Set11 --whole
    fi
done
gaussian=()  # what the weights for Gaussian noise are tested with
for name in CBSD68 Kodak24 Set12; do
    if there $name; then
        gaussian+=(${name}_15 ${name}_25 ${name}_50)
    fi
done
if [ ${#gaussian[@]} != 0 ]; then
    $python Denoising/test.py --dataset "${gaussian[@]}" --data_root "$data" --results $results
fi
for name in CC15 Nam25; do
    if there $name; then
        $python Denoising/test.py --weights denoising_photo --dataset $name --data_root "$data" --results $results
    fi
done
mkdir -p $results/data/test
for name in Rain100L Test100; do
    if there $name; then
        ln -sfn "$(folder "$data" $name)" $results/data/test/$name
        $python Deraining/test.py --dataset $name --data_root $results/data --results $results
    fi
done
if there CBSD68; then
    blurred=$results/data/CBSD68_blurred
    $python scripts/make_demo_data.py --task deblurring --copies 1 --test_source "$(folder "$data" CBSD68)" --out $blurred
    $python Deblurring/test.py --dataset $blurred/test --results $results
fi
if there reds_small; then
    $python Deblurring/test.py --dataset "$(folder "$data" reds_small)/test" --results $results
fi

printf '\n%-24s %-20s %8s %8s %8s %8s %8s\n' weights "data set" images PSNR SSIM "input's" SSIM
for table in compressive_sensing whole/compressive_sensing denoising deraining deblurring; do
    [ -f $results/$table.csv ] || continue
    awk -F, 'NR > 1 { set = $4 ($12 ~ /whole=True/ ? ", whole" : "")
                      if (!(($2, set) in row)) order[++count] = $2 SUBSEP set
                      row[$2, set] = sprintf("%-24s %-20s %8d %8.2f %8.4f %8.2f %8.4f", $2, set, $6, $7, $8, $9, $10) }
        END { for (k = 1; k <= count; k++) print row[order[k]] }' $results/$table.csv
done
if [ ${#missing[@]} != 0 ]; then
    echo "left out, for they are not in $data: ${missing[*]}"
fi
