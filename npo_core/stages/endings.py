"""The sentence that each notebook ends with, computed from its runs: what came out, and on how little it stands (ours).

Figures are those of `metrics.jsonl`, `events.jsonl` and `result.json`; no sentence is written beforehand.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..method.premise import in_words
from ..method.quantities import Cost, Quality, Signal
from .signal import MeasuredSignal, read_premise

FIRST = 10
"""Steps whose mean is where a run began."""

GRPO = "GRPO"
"""Label of the run that others are held against."""

ONE_SEED = "One seed is no verdict."


def grpo(lines: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """What a run of GRPO came to, and what it left.

    Args:
        lines: Metric lines of the run, `RunFolder.metrics()`.
        result: `RunFolder.result()`.
    """
    quarter = max(1, len(lines) // 4)
    second, last = lines[quarter : 2 * quarter] or lines, lines[-quarter:]
    rate, began = _mean(last, "npo/pass_rate"), _mean(lines[:FIRST], "npo/pass_rate")
    creep = rate - _mean(second, "npo/pass_rate")
    left = _mean(last, "npo/entropy") / _mean(lines[:FIRST], "npo/entropy")
    wrong = _mean(last, "npo/all_wrong_groups")
    base, final = result["base"]["average"], result["final"]
    low, high = final["interval"]
    return _signs(
        f"In {len(lines)} steps GRPO took the on-policy pass rate from {began:.2f} (first {min(FIRST, len(lines))} "
        f"steps) to {rate:.2f} (last quarter, {creep:+.2f} from the second), and on the test problems from {base:.2f} "
        f"to {final['average']:.2f} ({low:.2f} to {high:.2f}); {100 * left:.0f} % of its entropy is left, and "
        f"{100 * wrong:.0f} % of the groups of the last quarter were all wrong and taught nothing."
    )


def interventions(results: Mapping[str, Mapping[str, Any]]) -> str:
    """How runs with interventions stand to GRPO at equal compute.

    Args:
        results: `RunFolder.result()` by label, GRPO's among them.
    """
    plain = results[GRPO]
    found = []
    for label, result in results.items():
        if label != GRPO:
            gain = result["final"]["average"] - plain["final"]["average"]
            found.append(
                f"{label} {gain:+.3f} (it stands at policy step {result['policy_steps']}, and sampled "
                f"{result['offline_rollouts']:,} rollouts off line)"
            )
    return _signs(
        f"Test pass rate after {plain['compute_steps']} executed steps, less {GRPO}'s "
        f"{plain['final']['average']:.3f}: {'; '.join(found)}. {ONE_SEED}"
    )


def decisions(events: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """What AutoNPO decided: every intervention, and how many warnings it dismissed.

    Args:
        events: Effective events of the run.
        result: `RunFolder.result()`.
    """
    warned, dismissed = (sum(event["event"] == kind for event in events) for kind in ("warning", "dismissed"))
    done = result["interventions"]
    counted = f"{warned} warning{'s' * (warned != 1)}, {dismissed} dismissed"
    if not done:
        return f"AutoNPO did not intervene ({counted}), so it trained as GRPO does."
    words = [
        f"at step {each['policy_step']} back by {each['distance']}"
        if each["distance"]
        else f"at step {each['policy_step']} without a roll-back"
        for each in done
    ]
    edges = sum(bool(each["at_edge"]) for each in done)
    told = f" {edges} of {len(done)} chose the edge of what was saved." if edges else ""
    return f"AutoNPO intervened {_times(len(done))}, {', '.join(words)} ({counted}).{told}"


def signal(measured: MeasuredSignal) -> str:
    """Whether the premise holds from each origin, and where S peaks (interval over prompts); a paragraph each."""
    told, peak = [], Signal(Quality.MANY, Cost.GRADIENT_CURRENT).name
    for origin, entry in measured.summary["origins"].items():
        words = "the policy fails too little to tell."
        if found := [read_premise(one) for one in entry["premise"]]:
            words = in_words(found, measured.summary["settings"]["rollouts"])
        told.append(f"From policy step {origin}: {words}")
        if (best := entry["optimum"].get(peak)) is not None:
            between = "" if best["low"] is None else f" ({best['low']:g} to {best['high']:g} over prompts)"
            edge = ", the edge of what was measured" if best["at_edge"] else ", inside of what was measured"
            told[-1] += f" There S, with V measured at weight 1, is largest at Δ = {best['distance']:g}{between}{edge}."
    return "\n\n".join(told)


def arms(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Arms in the order of their test pass rates, best first, each less GRPO's where that is among them.

    Args:
        results: `RunFolder.result()` by arm.
    """
    scores = {label: result["final"]["average"] for label, result in results.items()}
    listed, plain = [], scores.get(GRPO)
    for label in sorted(scores, key=scores.__getitem__, reverse=True):
        less = "" if plain is None or label == GRPO else f" ({scores[label] - plain:+.3f})"
        listed.append(f"{label} {scores[label]:.3f}{less}")
    less = "" if plain is None else f", in brackets less {GRPO}'s"
    return _signs(f"Test pass rates of this seed, best first{less}: {', '.join(listed)}. {ONE_SEED}")


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _signs(text: str) -> str:
    """With a true minus sign before numbers."""
    return text.replace(" -", " −").replace("(-", "(−")
