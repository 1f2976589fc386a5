"""Near-Future Policy Optimization: the reference implementation.

The names below are the public face. They are loaded on first use, so `import npo_core` is light and the maths modules
(`npo_core.groups`, `npo_core.ratios`, …) work without TRL.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AutoNPO": "autonpo",
    "BoxedVerifier": "verifiers",
    "GuidanceCache": "trajectories",
    "GuidanceSource": "sources",
    "GuidanceWindow": "sources",
    "NPOConfig": "arguments",
    "NPOTrainer": "trainer",
    "OwnPast": "replay",
    "ReplayPool": "replay",
    "RunConfig": "config",
    "RunFolder": "runs",
    "ScheduledNPO": "interventions",
    "SignalSettings": "signal_report",
    "Trajectory": "trajectories",
    "Verdict": "verifiers",
    "measure_folder": "signal_stages",
    "resolve_config": "config",
    "sample_rollouts": "sampling",
    "tokenizer_digest": "policies",
    "training_schedule": "tasks",
    "verifier_reward": "verifiers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
