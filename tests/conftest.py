"""What holds for every test: set before torch is imported, which reads the thread settings once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes in the signatures of the maths are checked at run time, in tests only. The hook works on modules that are not
# imported yet, hence here.
CHECKED = ("groups", "ratios", "signal", "stats", "curve", "premise")
install_import_hook([f"npo_core.method.{name}" for name in CHECKED], "beartype.beartype")

# A deadline per example measures the machine's other load; a fixed choice of examples makes a failure repeatable.
settings.register_profile("npo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("npo")
