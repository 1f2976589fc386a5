"""Do two checkouts train to the same bytes? `python tests/same_bytes.py OTHER_CHECKOUT [--keep FOLDER]`.

GRPO, NPO and AutoNPO on presets smoke and cpu (60 steps, with interventions), seed 0: each run once in either checkout,
and their `metrics.jsonl` compared, byte by byte but for `step_time`. Run it for a change that should move no number.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHORT = {
    "grpo": [],
    "npo": ["scout_steps=10", "early_window=10", "late_step=30", "late_start=20"],
    "autonpo": [
        "trigger_warmup=15",
        "trigger_window=10",
        "trigger_reward_tolerance=1.0",
        "trigger_entropy_drop=1.0e-6",
        "trigger_cooldown=10",
        "confirm_quality=0.0",
        "quality_floor=0.0",
    ],
}
"""Settings with which 60 steps of preset cpu hold interventions."""

TIME = re.compile(rb'"step_time": [0-9.e-]+, ')
"""What a clock says differs from run to run."""


def metrics(checkout: Path, method: str, preset: str, root: Path) -> str:
    """SHA-256 of the metrics of one run, made in `checkout` unless `root` holds it."""
    settings = ["compute_steps=60", *SHORT[method]] if preset == "cpu" else []
    command = [sys.executable, "-m", "npo_core", method, "--preset", preset, "--root", str(root), "--quiet"]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {checkout} failed:\n{done.stderr[-2000:]}")
    [found] = root.glob(f"{method}-{preset}-*/metrics.jsonl")
    return hashlib.sha256(TIME.sub(b"", found.read_bytes())).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the checkout to compare this one with")
    parser.add_argument("--keep", type=Path, help="folder for the runs; those that are there are not made again")
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    differ = 0
    with tempfile.TemporaryDirectory() as scratch:
        keep = (options.keep or Path(scratch)).resolve()
        for preset in ("smoke", "cpu"):
            for method in SHORT:
                name = f"{method}-{preset}"
                first = metrics(options.other.resolve(), method, preset, keep / "other" / name)
                second = metrics(here, method, preset, keep / "here" / name)
                differ += first != second
                print(f"{name:14} {first[:16]} {second[:16]} {'same' if first == second else 'DIFFERENT'}", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
