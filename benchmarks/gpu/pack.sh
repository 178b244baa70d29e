#!/usr/bin/env bash
# Collect in benchmarks/gpu/kit (ignored by git) what a machine with a GPU but without a network lacks.
#
#     benchmarks/gpu/pack.sh [TASK04]        # PYTHON=3.11 packs for another Python than 3.12
#
# The machine has Python, torch and the usual scientific packages. The kit brings nnU-Net and its parts as wheels, in the
# versions that are installed here, and TASK04, the Decathlon's Task04_Hippocampus. Images travel as they are: resampled
# ones are larger, and to resample them takes a minute there. Without TASK04 the kit has no images, and runs all parts but
# the last three.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kit=$here/kit
python=${PYTHON:-3.12}
rm -rf "$kit"
mkdir -p "$kit/wheels"
installed() { python -c "import sys; from importlib.metadata import version as v; print(*(f'{n}=={v(n)}' for n in sys.argv[1:]))" "$@"; }

# Pure Python: made from source here, if there is no wheel of them.
pip wheel --quiet --no-deps --wheel-dir "$kit/wheels" $(installed nnunetv2 dynamic-network-architectures batchgenerators \
    batchgeneratorsv2 acvl-utils future yacs graphviz monai nibabel click timm httpx)
# Compiled ones: for the Python and system of that machine.
pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp --dest "$kit/wheels" \
    $(printf -- '--platform %s ' manylinux_2_{39,35,34,31,28,27,26,24,17,12,5}_x86_64 manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64) \
    $(installed blosc2 ndindex numexpr msgspec connected-components-3d pydantic pydantic-core annotated-types msgpack)
if [ $# -gt 0 ]; then
    mkdir "$kit/data"
    cp -r "$1"/imagesTr "$1"/labelsTr "$kit/data/"
    rm -f "$kit"/data/*/._*
fi
size=$(du -sm "$kit" | cut -f1)
echo "$kit: $size MiB"
if [ "$size" -ge 60 ]; then echo "more than the 60 MiB that can travel together with the repository" >&2; exit 1; fi
