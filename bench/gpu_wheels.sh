#!/usr/bin/env bash
# Collect the packages that bench/gpu_check.sh needs on a machine without an index, as a folder of at most 60 MiB.
#
#   bench/gpu_wheels.sh OUT [PYTHON_VERSION [CUDA_VERSION]]     e.g. bench/gpu_wheels.sh wheels 3.12 130
#   bench/gpu_wheels.sh --list                                  the names of the packages
#
# That machine must have PyTorch >= 2.11 with CUDA, torchvision, transformers, accelerate and OpenCV, for x86_64 Linux.
# PYTHON_VERSION is its Python (default: that of this machine), CUDA_VERSION the CUDA of its PyTorch (default: 130).
# The versions are those of constraints.txt. Of diffusers only Qwen-Image's pipeline is kept, of bitsandbytes only the
# library of one CUDA version, and deepspeed is built from its source (it compiles nothing until it is used). Needs pip
# and wheel, and torch for building deepspeed.
set -euo pipefail

packages=(diffusers bitsandbytes hjson webdataset braceexpand lpips peft pydantic pydantic-core annotated-types
    typing-inspection importlib-metadata zipp py-cpuinfo msgpack ninja)
most_mib=60
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

[[ ${1:-} == --list ]] && { printf '%s\n' deepspeed "${packages[@]}"; exit 0; }
[[ $# -ge 1 && $# -le 3 && $1 != -* ]] || { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
out=$1 cuda=${3:-130}
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

pinned() { grep -i "^$1==" "$here/../constraints.txt" || { echo "constraints.txt does not pin $1" >&2; exit 1; }; }
wanted=()
for name in "${packages[@]}"; do wanted+=("$(pinned "$name")"); done
deepspeed=$(pinned deepspeed)

"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$work/wheels" --python-version "$version" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any "${wanted[@]}"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-binary deepspeed \
    --wheel-dir "$work/wheels" "$deepspeed"

# Unpack a wheel, keep the files that the function $2 leaves, and pack it again with a correct list of its files.
reduce() {
    local folder
    "$python" -m wheel unpack --dest "$work/$1" "$work"/wheels/"$1"-*.whl >/dev/null
    folder=$(echo "$work/$1"/*)
    rm "$work"/wheels/"$1"-*.whl
    "$2" "$folder"
    "$python" -m wheel pack --dest-dir "$work/wheels" "$folder" >/dev/null
}
one_pipeline() { find "$1/diffusers/pipelines" -mindepth 1 -maxdepth 1 -type d ! -name qwenimage -exec rm -r {} +; }
one_cuda() { find "$1/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "libbitsandbytes_cuda$cuda.so" -delete; }
reduce diffusers one_pipeline
reduce bitsandbytes one_cuda

rm -f "$out"/*.whl
mv "$work"/wheels/*.whl "$out"
mib=$(du -sm "$out" | cut -f1)
ls -l "$out"
echo "$mib MiB in $out, for Python $version and CUDA $cuda"
[[ $mib -le $most_mib ]] || { echo "more than $most_mib MiB" >&2; exit 1; }
