"""Which files git has, or would take: what a stranger gets."""

import subprocess
import tempfile
from pathlib import Path


def committed(root: Path) -> list[Path]:
    """Files of a checkout that are, or are about to be, committed: tracked ones, and new ones that are not ignored.

    An unpacked archive has no history: all its files count but those that its `.gitignore` names.
    """
    with tempfile.TemporaryDirectory() as empty:
        place = []
        if not (root / ".git").exists():
            subprocess.run(["git", "init", "-q", "--bare", empty], check=True)
            place = [f"--git-dir={empty}", f"--work-tree={root}"]
        command = ["git", *place, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    # a file that is about to be deleted is listed, and not there
    return [path for name in listing.split("\0") if name and (path := root / name).is_file()]
