#!/usr/bin/env bash
# Run the measurements on this machine, or one part of them in at most ten minutes; print a short table last.
#
#     benchmarks/gpu/run.sh [--part N] [--device cuda|cpu] [--tiny] [--out DIR] [--work DIR]
#
#     1 smoke     every trainer works: mixed precision, torch.compile, stop and --c, --val, prediction
#     2 cost      time and memory of a step at nnU-Net's own sizes: 3D 128^3, 2D 512^2, ResEncL; flat LoRA's short backward
#     3 compiled  the same under torch.compile, for fewer methods
#     4 source    pretrain the donor of two shifts, 50 epochs of nnU-Net's own network
#     5 merged    pretrain the donor of the third
#     6 methods   fine-tune both on 1, 4 and all cases
#
# Parts are in the order of their value. 4 to 6 belong together: they need one machine, and WORK, for all three. A part
# that took too long is stopped; what it had written counts, and 4 to 6 go on where they stopped. --tiny shows that all
# of this runs: tiny networks, synthetic images, one donor, and no part 3, for which a CPU would need a compiler.
# Where benchmarks/gpu/kit is (see pack.sh), its wheels are installed into WORK/site. JSON goes to OUT, $OUT by default.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
parts="1 2 3 4 5 6" device=cuda tiny="" out=${OUT:-$root/benchmarks/results/gpu} work=/tmp/nnunet-dante-gpu
while [ $# -gt 0 ]; do
    case $1 in
        --part) parts=$2; shift ;;
        --device) device=$2; shift ;;
        --out) out=$2; shift ;;
        --work) work=$2; shift ;;
        --tiny) tiny=--tiny ;;
        *) echo "unknown: $1" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$out" "$work"
if [ -d "$here/kit/wheels" ] && ! [ -e "$work/site/nnunetv2" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" "$here"/kit/wheels/*.whl
fi
stubs=$work/stubs  # only what is missing here
mkdir -p "$stubs"
python3 -c "import SimpleITK" 2>/dev/null || cp "$here"/stubs/*.py "$stubs"
export PYTHONPATH=$root:$work/site:$stubs${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=Agg PYTHONUNBUFFERED=1
python3 - "$device" <<'CHECK'
import sys
import torch, nnunetv2, dynamic_network_architectures, batchgeneratorsv2, blosc2, nibabel, msgspec, monai, nnunet_dante.training.trainers
assert sys.argv[1] == "cpu" or torch.cuda.is_available(), "torch finds no CUDA GPU"
print("torch", torch.__version__, torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU", file=sys.stderr)
CHECK
limit() { timeout --signal=INT --kill-after=20 "$1" "${@:2}" || { code=$?; [ $code = 124 ] && echo "stopped after $1 s" >&2 || return $code; }; }
cost() { limit "$1" python3 "$root/benchmarks/cost.py" --device "$device" "${@:2}"; }
run() {
    case $1$tiny in
        1*) limit 570 python3 "$here/smoke.py" --device "$device" --out "$out" $tiny ;;
        2--tiny) flat
            cost 200 --out "$out/3d" --dims 3 --features 4 8 12 --patches 32 16 --rounds 1
            cost 200 --out "$out/residual" --dims 2 --features 4 8 12 --patches 32 16 --rounds 1 --residual ;;
        2) flat
            cost 250 --amp --rounds 5 --out "$out/3d" --dims 3 "${size[@]}"
            cost 140 --amp --rounds 5 --out "$out/2d" --dims 2 --features 32 64 128 256 512 512 512 512 --patches 512 128 --batches 12 2
            cost 120 --amp --rounds 5 --out "$out/residual" --dims 3 "${size[@]}" --residual --only "${few[@]}" ;;
        3) cost 570 --amp --compile --rounds 5 --out "$out/3d" --dims 3 "${size[@]}" --only "${few[@]}" ;;
        4*) truth source ;;
        5) truth merged ;;
        6*) truth methods
            python3 "$here/truth.py" "$work/truth" --step table
            cp "$work/truth/truth.json" "$out/" ;;
        3--tiny|5--tiny) ;;
        *) echo "--part is '$1'; give a number from 1 to 6" >&2; exit 2 ;;
    esac
}
size=(--features 32 64 128 256 320 320 --patches 512 128)
few=(LoRA "LoRA, decoder" DecoderOnly "full fine-tuning, recompute" "forward alone")
flat() { limit 60 python3 "$here/flat_backward.py" --device "$device" --out "$out" $tiny; }
truth() { limit 560 python3 "$here/truth.py" "$work/truth" --data "$here/kit/data" --step "$1" --device "$device" $tiny; }
for part in $parts; do run "$part"; done
