"""What a controller decided, for a reader: one row an intervention or dismissed warning, the reason as a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from .folder import DECISIONS

COLUMNS = ("step", "changes", "pool", "Δ*", "Q̂", "V̂", "Ŝ", "edge", "guides of asked", "back to")
"""Columns of the table; `step` is the policy step of the decision."""


def decision_table(events: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row a decision, in the order they were taken, all cells as text of few digits; columns `COLUMNS`.

    Args:
        events: Effective events of a run.
    """
    return [_row(found) for found in _decisions(events)]


def decision_reasons(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why each of those decisions was as it was, a sentence each."""
    return [_sentence(found) for found in _decisions(events)]


def _decisions(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """Events of each decision by kind; those of one compute step belong together."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for event in events:
        if event["event"] in DECISIONS:
            found.setdefault(event["compute_step"], {})[event["event"]] = event
    return list(found.values())


def _row(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "")
    row["step"] = str(next(iter(found.values()))["policy_step"])
    if warning := found.get("warning"):
        reward, entropy = warning["reward_change"], warning["entropy_change"]
        row["changes"] = f"reward {reward:+.2f}, entropy {100 * entropy:+.0f} %".replace("-", "−")
    if probe := found.get("probe"):
        row["pool"] = f"{probe['pool']} prompts"
    choice = found.get("choice")
    if choice is not None and choice["chosen"] is not None:
        best = next(one for one in choice["candidates"] if one["distance"] == choice["chosen"])
        row |= {"Δ*": f"{choice['chosen']} steps", "edge": "yes" if choice["at_edge"] else "no"}
        row |= {"Q̂": f"{best['quality']:.2f}", "V̂": f"{best['variance']:.2f}", "Ŝ": f"{best['signal']:.2f}"}
    if cache := found.get("cache"):
        row["guides of asked"] = f"{cache['cached']} of {cache['prompts']}"
    if rollback := found.get("rollback"):
        row["back to"] = str(rollback["to"])
        row["Δ*"] = row["Δ*"] or f"{rollback['distance']} steps"
    elif ahead := found.get("ahead"):
        row["back to"] = f"no roll-back, guided until {ahead['until']}"
    elif "dismissed" in found:
        row["back to"] = "dismissed"
    return row


def _sentence(found: Mapping[str, Mapping[str, Any]]) -> str:
    step = next(iter(found.values()))["policy_step"]
    if "dismissed" in found:
        reason = f"dismissed, {found['dismissed']['reason']}"
    elif "choice" in found:
        reason = found["choice"]["reason"]
    elif "planned" in found:
        reason = f"planned before the run, stage {found['planned']['stage']}"
    elif "ahead" in found:
        reason = f"guided from here until step {found['ahead']['until']}, without a roll-back"
    else:
        reason = "training went on as if nothing had happened"
    return f"Step {step}: {reason}."
