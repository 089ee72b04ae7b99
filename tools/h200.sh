#!/usr/bin/env bash
# All that only a GPU machine can tell, in ten minutes and one command:
#
#     tools/h200.sh [OUT]
#
# It takes the machine's own Python and torch and needs no network. Each tool that is there writes
# its JSON and its log into OUT (default benchmarks/DEVICE, as h200); what fails does not stop the
# rest, but is told at the end, and in the exit status. PYTHON=... names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

# --- what must be there ---
"$python" - <<'PY' || exit 1
import importlib.util
import sys

#: Module to package. torch and numpy are the machine's own.
NEEDED = {
    "torch": "torch", "numpy": "numpy", "accelerate": "accelerate", "scipy": "scipy",
    "pandas": "pandas", "pydantic": "pydantic", "yaml": "pyyaml", "rich": "rich", "cv2":
    "opencv-python-headless", "albumentations": "albumentations", "lmdb": "lmdb", "psutil":
    "psutil", "torchmetrics": "torchmetrics", "tensorboard": "tensorboard", "safetensors":
    "safetensors", "google_crc32c": "google-crc32c", "fsspec": "fsspec", "av": "av", "tifffile":
    "tifffile",
}
missing = [package for module, package in NEEDED.items() if not importlib.util.find_spec(module)]
if missing:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = " ".join(missing)
    sys.exit(
        f"error: packages are missing: {names}\n"
        "Where there is a network, fetch them for this Python:\n"
        f"  pip download --no-deps --only-binary=:all: --python-version {version} -d wheels"
        f" -c constraints.txt {names}\n"
        "and here, beside the machine's own torch:\n"
        f"  {sys.executable} -m pip install --no-deps --no-index --find-links wheels {names}\n"
        "pip check names what those need in turn."
    )
import torch

if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} sees no CUDA device here; this is for GPU machines")
PY

device=$("$python" -c '
import torch
words = torch.cuda.get_device_name(0).lower().replace("nvidia", "").split()
print(words[0] if words else "gpu")')
out=${1:-benchmarks/$device}
mkdir -p "$out" || exit 1
failed=()
began=$SECONDS

# run NAME SECONDS COMMAND...: with a time limit; NAME.log and the summary's line are its record.
run() {
  local name=$1 limit=$2
  shift 2
  local start=$SECONDS status=0
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  if ((status)); then
    failed+=("$name")
    tail -n 5 "$out/$name.log"
  fi
  printf '{"name": "%s", "status": %d, "seconds": %d}\n' \
    "$name" "$status" "$((SECONDS - start))" >>"$out/runs.jsonl"
}

# bench NAME SECONDS ARGUMENTS...: of tools/bench_NAME.py, where it is.
bench() {
  local name=$1 limit=$2
  shift 2
  if [[ -f tools/bench_$name.py ]]; then
    run "$name" "$limit" "$python" "tools/bench_$name.py" --json "$out/$name.json" "$@"
  else
    echo "== $name: tools/bench_$name.py is not here"
  fi
}

: >"$out/runs.jsonl"
bench step 200
bench norm 30 --quick
bench recompute 80 --quick
bench checkpoint 70 --quick
bench augment 50 --quick
bench loader 60 --quick
run profile 30 "$python" tools/profile_step.py --out "$out/profile"
if "$python" -c 'import hypothesis, pytest' 2>/dev/null; then
  run tests 70 "$python" -m pytest -q -m cuda tests
else
  echo "== tests: pytest or hypothesis is not here"
fi

"$python" - "$out" "$((SECONDS - began))" <<'PY'
import json
import pathlib
import platform
import subprocess
import sys

import torch

out, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2])
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
record = {
    "machine": {
        "gpu": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
    },
    "commit": commit or None,
    "seconds": seconds,
    "runs": [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()],
    "summaries": {
        path.stem: json.loads(path.read_text()).get("summary")
        for path in sorted(out.glob("*.json"))
        if path.stem != "machine"
    },
}
(out / "machine.json").write_text(json.dumps(record, indent=2) + "\n")
PY
rm -f "$out/runs.jsonl"
echo "== $((SECONDS - began)) s; the figures are in $out"
if ((${#failed[@]})); then
  echo "error: failed: ${failed[*]}; see their logs in $out" >&2
  exit 1
fi
