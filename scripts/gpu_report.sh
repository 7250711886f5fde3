#!/usr/bin/env bash
# What this repository does on a GPU, in one command: its tests, the speed of training and of restoring, a profile.
#   bash scripts/gpu_report.sh [MINUTES]         # 25 without a number; what they do not allow is left to the next call
#   bash scripts/gpu_report.sh [--device cpu] [--tiny] [--dry_run]
# Each part leaves its output, tables and JSON in results/gpu_report, and is not repeated by the next call; all of them
# together are report.md and benchmark-CARD.csv there. --tiny takes small images and compiles nothing, to try the command
# itself on a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
minutes=25 device=cuda tiny= dry_run=
while [ $# != 0 ]; do
    case $1 in
        --device) device=${2:?--device needs a device}; shift ;;
        --tiny) tiny=1 ;;
        --dry_run) dry_run=1 ;;
        *[!0-9]* | '') sed -n '2,7s/^# *//p' "$0" >&2; exit 2 ;;
        *) minutes=$1 ;;
    esac
    shift
done
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if [ -z "$dry_run" ] && [ "$device" = cuda ] && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "PyTorch sees no GPU; check nvidia-smi and the driver, or take --device cpu --tiny" >&2
    exit 2
fi
results=results/gpu_report names=()
if [ -z "$dry_run" ]; then mkdir -p $results; fi
export PYTHONPATH=$PWD:$PWD/scripts TORCHINDUCTOR_COMPILE_THREADS=4  # several processes compile at once
end=$((SECONDS + 60 * minutes))

part() {  # part NAME MINUTES COMMAND...: run it in that time or in what is left, unless it has been done
    local name=$1 most=$((60 * $2)) status=0
    names+=("$name")
    shift 2
    if [ -e "$results/$name.done" ]; then
        return
    fi
    if [ $((end - SECONDS)) -lt "$most" ]; then most=$((end - SECONDS)); fi
    if [ "$1" = benchmark ]; then
        shift
        set -- $python scripts/benchmark.py "$@" --device "$device" --out "$results/$name.json" --case_seconds 150 \
            --minutes "$(awk "BEGIN { print ($most - 30) / 60 }")"
        if [ -n "$tiny" ]; then set -- "$@" --runs 1 --batch 1 --crop 32 --sizes 64x64; fi
    fi
    if [ -n "$dry_run" ]; then
        echo "$name, at most $most s: $*"
        return
    fi
    if [ "$most" -lt 45 ]; then
        echo "$name: left to the next call, for the time is over"
        return
    fi
    printf '\n== %s\n' "$name"
    timeout --kill-after 10 "$most" "$@" 2>&1 | tee "$results/$name.txt" || status=$?
    if [ $status = 0 ] && ! grep -q '^left out, for the time is over' "$results/$name.txt"; then
        touch "$results/$name.done"
    else
        echo "$name: not complete (status $status); the next call does it again"
    fi
}

large=deblurring_dgunet small=compressive_sensing_dgunet compile=--compile
if [ -n "$tiny" ]; then compile=; fi
part tests 6 $python -m pytest tests/test_gpu.py -m gpu -n 8 --dist worksteal -q --durations 10
part train_small 6 benchmark train --variants $small --batch 64 --crop 96 $compile
part train_large 6 benchmark train --variants $large --batch 8 --crop 256 $compile
part restore 5 benchmark forward --variants $large deraining_dgunet --sizes 1280x720 $compile
part parts 2 benchmark parts --variants $large --batch 8 --crop 256
part others 3 benchmark others --variants $large --sizes 256x256 1280x720
part train_deraining 6 benchmark train --variants deraining_dgunet --batch 16 --crop 256 $compile
part train_paper 6 benchmark train --variants $large --batch 16 --crop 256 $compile
part restore_plus 5 benchmark forward --variants ${large}_plus denoising_dgunet_plus deraining_dgunet_plus \
    --sizes 1280x720 $compile
part restore_sensing 4 benchmark forward --variants $small ${small}_plus --sizes 1280x704 $compile
part loader 2 benchmark data
part profile 3 benchmark train --variants $large --batch 8 --crop 256 --runs 1 --profile

if [ -n "$dry_run" ]; then
    exit
fi
csv=()
{
    echo '# What was measured'
    for name in "${names[@]}"; do
        [ -e $results/$name.txt ] || continue
        printf '\n## %s\n\n' $name
        if [ -e $results/$name.md ]; then
            cat $results/$name.md
            csv+=($results/$name.csv)
        else
            printf '```\n%s\n```\n' "$(tail -15 $results/$name.txt)"
        fi
    done
} > $results/report.md
card=$($python -c 'import sys; from benchmark import device_name; print(device_name(sys.argv[1]))' "$device")
card=$(tr -cs 'A-Za-z0-9\n' - <<< "$card")
if [ ${#csv[@]} != 0 ]; then awk 'FNR > 1 || NR == 1' "${csv[@]}" > "$results/benchmark-$card.csv"; fi
printf '\nwrote %s\n' "$results/report.md and $results/benchmark-$card.csv"
