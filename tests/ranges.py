"""Both ends of the ranges in pyproject.toml: `python tests/ranges.py lowest|newest`, the arguments of `pip install`.

What `make test-range` installs beside the package: the lowest release of each range, or the range, for its newest.
torch is the same at both ends: its next releases bring gigabytes of CUDA packages to a machine without a GPU.
"""

import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

TORCH = "torch==2.13.0"


def ends(which: str) -> list[str]:
    """Requirements of the core at one end of their ranges.

    Args:
        which: "lowest" or "newest".
    """
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    found = [TORCH]
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name == "torch":
            continue
        (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        found.append(f"{requirement.name}=={lowest}" if which == "lowest" else str(requirement))
    return found


if __name__ == "__main__":
    print(*ends(sys.argv[1]), sep="\n")
