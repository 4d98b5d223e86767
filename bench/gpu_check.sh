#!/usr/bin/env bash
# Run bench/gpu_check.py on a machine with a GPU, PyTorch >= 2.11 and no access to a package index. No weights, no hub.
#
#   bench/gpu_wheels.sh wheels 3.12                                             beforehand, where there is an index
#   bench/gpu_check.sh --wheels wheels --out results/gpu --minutes 8
#   bench/gpu_check.sh --out results/gpu --train mine.yaml data.shards=shards   the time left for a training
#   bench/gpu_check.sh --out results/gpu --tiny                                 rehearsal on any CPU
#
# If packages are missing, the folder of wheels is installed into OUT/packages, which is put before the packages of
# PYTHON (default: python3). --minutes counts this too. All other options are those of gpu_check.py (--help).
set -uo pipefail

began=$SECONDS
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3} wheels='' out='' minutes=8 rest=()
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --out) out=${2:?--out needs a folder}; shift 2 ;;
        --minutes) minutes=${2:?--minutes needs a number}; shift 2 ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) rest+=("$1"); shift ;;
    esac
done
[[ -n $out ]] || { echo "gpu_check.sh: give --out, a folder for the results" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

find_missing() {
    "$python" - <<'PYTHON'
from importlib.util import find_spec
names = "torch torchvision diffusers deepspeed webdataset lpips bitsandbytes peft accelerate transformers pydantic hjson"
print(*(name for name in names.split() if find_spec(name) is None))
PYTHON
}
missing=$(find_missing)
if [[ -n $missing && -n $wheels ]]; then
    # a folder on the path instead of an environment: it needs neither ensurepip nor rights to install
    "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check --upgrade \
        --target "$out/packages" "$wheels"/*.whl
    export PYTHONPATH=$out/packages${PYTHONPATH:+:$PYTHONPATH}
    missing=$(find_missing)
fi
[[ -z $missing ]] || echo "gpu_check.sh: not installed: $missing; the steps that need them will fail" >&2

left=$("$python" -c "print(float('$minutes') - ($SECONDS - $began) / 60)") || exit 2
exec "$python" "$here/gpu_check.py" --out "$out" --minutes "$left" "${rest[@]}"
