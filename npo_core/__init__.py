"""Near-Future Policy Optimization: the reference implementation.

The names below are the public face. They are loaded on first use, so `import npo_core` is light and the maths modules
(`npo_core.method`) work without TRL.
"""

from importlib import import_module, metadata
from typing import Any

_HOMES = {
    "AutoNPO": "control.auto",
    "BoxedVerifier": "guidance.verifiers",
    "GuidanceCache": "guidance.trajectories",
    "GuidanceSource": "guidance.sources",
    "GuidanceWindow": "guidance.sources",
    "NPOConfig": "trainer.config",
    "NPOTrainer": "trainer.trainer",
    "OwnPast": "guidance.replay",
    "ReplayPool": "guidance.replay",
    "RunConfig": "runs.config",
    "RunFolder": "runs.folder",
    "ScheduledNPO": "control.scheduled",
    "SignalSettings": "runs.settings",
    "Trajectory": "guidance.trajectories",
    "Verdict": "guidance.verdicts",
    "explore": "explore",
    "measure_folder": "stages.signal",
    "resolve_config": "runs.config",
    "sample_rollouts": "trainer.sampling",
    "tokenizer_digest": "guidance.fingerprints",
    "training_schedule": "trainer.dataset",
    "verifier_reward": "guidance.verdicts",
    "with_uids": "trainer.dataset",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__version__":
        return metadata.version(__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
