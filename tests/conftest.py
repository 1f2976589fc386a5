"""What holds for every test: set before torch is imported, which reads the thread settings once."""

import gc
import os
import shutil
from collections import Counter
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

gc.disable()  # until the tests begin: imports make no garbage, and looking for it takes a fifth of their time

# Shapes in the signatures of the maths are checked at run time, in tests only. The hook works on modules that are not
# imported yet, hence here.
CHECKED = ("groups", "ratios", "signal", "stats", "curve", "premise")
install_import_hook([f"npo_core.method.{name}" for name in CHECKED], "beartype.beartype")

LUCK = int(os.environ.get("NPO_LUCK", "0"))
"""Added to every seed: `NPO_LUCK=1 make test` shows which tests hang on the numbers that are drawn."""

if LUCK:
    import torch

    from npo_core.streams import Stream

    torch_seed, stream_key = torch.manual_seed, Stream.key
    torch.manual_seed = lambda seed: torch_seed(seed + LUCK)
    Stream.key = lambda self, seed, *place: stream_key(self, seed + LUCK, *place)

# A deadline per example measures the machine's other load; a fixed choice of examples makes a failure repeatable.
settings.register_profile("npo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("npo")

NEEDED = {
    "test_browser.py": ("NPO_BROWSER" in os.environ and find_spec("playwright"), "no browser: `make test-browser`"),
    "test_widget.py": (find_spec("anywidget"), "no anywidget: `make test-browser`"),
    "test_maths.py": (shutil.which("node"), "no node (Node.js 20 or newer): the page's maths is not compared"),
}
"""Files of tests/explore that need a program from outside: whether it is here, and what to say if not."""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Tables that `datasets` writes beside what it reads stay out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.hookimpl(trylast=True)  # what is left out is gone by then
def pytest_collection_modifyitems(items):
    """Files with long tests first, then those with many: workers take whole files, and the last should be short."""
    long, all_of = Counter(), Counter()
    for item in items:
        all_of[item.path] += 1
        long[item.path] += item.get_closest_marker("slow") is not None
    items.sort(key=lambda item: (-long[item.path], -all_of[item.path], str(item.path)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """What was imported stays, so no look for garbage goes through it: runs and measurements look several times."""
    gc.freeze()
    gc.enable()


def pytest_report_header():
    lucky = [f"all seeds are moved by {LUCK}: tests/test_streams.py pins what they draw, and fails"] if LUCK else []
    return lucky + [f"left out: tests/explore/{name}, {words}" for name, (there, words) in NEEDED.items() if not there]


def pytest_ignore_collect(collection_path):
    if collection_path.parent.name == "explore" and collection_path.name in NEEDED:
        return True if not NEEDED[collection_path.name][0] else None
    return None
