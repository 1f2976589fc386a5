"""NPOTrainer: TRL's GRPOTrainer with near-future guidance in the last slot of gated groups.

What is added to plain GRPO, and nothing else:

1. After the rollouts of a step are sampled, each group whose on-policy pass rate (over all n rollouts) is at most
   `tau_gate` and for which the source has a guide gets its last rollout replaced by the guide's token ids.
2. In the loss, the guide rows get the importance ratio of the chosen mode.
3. On-policy metrics `npo/…`, from which guide rows are excluded.

No method of TRL is copied. Without guidance the weights are bit-identical to GRPOTrainer's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import GRPOConfig, GRPOTrainer

from .groups import gate, guide_rows, pass_rate
from .ratios import MAX_LOG_WEIGHT, gradient_weight
from .sources import GuidanceSource
from .tasks import require_columns
from .trajectories import GuidanceRefused, Trajectory
from .verifiers import Verdict, completion_text

Verifier = Callable[[str, Mapping[str, Any]], Verdict]
"""`verifier(response text, data set row) -> Verdict`."""


@dataclass
class NPOConfig(GRPOConfig):
    r"""GRPOConfig with NPO's settings.

    Args:
        tau_gate (`float`, *optional*, defaults to `0.6`): A group is gated when its on-policy pass rate, over all n
            rollouts, is at most this. In [0, 1]. Paper.
        ratio_mode (`str`, *optional*, defaults to `"current"`): Importance ratio of guide tokens. `"current"`: the
            guide counts as sampled from the policy that sampled the batch (ratio 1 at the first update; paper's
            default). `"exact"`: π_θ/q with the guide's stored log-probs q, clipped like every other ratio. Paper.
            `"truncated"`: min(π_θ/q, ratio_truncation) as a constant weight, not clipped. Ours. `"shaped"`:
            x/(x+ratio_gamma) with x = π_θ/q, not clipped. LUFFY.
        ratio_truncation (`float`, *optional*, defaults to `2.0`): Largest weight in mode truncated. Ours.
        ratio_gamma (`float`, *optional*, defaults to `0.1`): γ in mode shaped. LUFFY.
    """

    tau_gate: float = field(default=0.6, metadata={"help": "Gate: largest on-policy pass rate of a guided group."})
    ratio_mode: Literal["current", "exact", "truncated", "shaped"] = field(
        default="current", metadata={"help": "Importance ratio of guide tokens."}
    )
    ratio_truncation: float = field(default=2.0, metadata={"help": "Largest weight in ratio mode truncated."})
    ratio_gamma: float = field(default=0.1, metadata={"help": "γ of x/(x+γ) in ratio mode shaped."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.tau_gate <= 1:
            raise ValueError(f"tau_gate is {self.tau_gate}; a pass rate lies in [0, 1].")
        if self.ratio_mode not in ("current", "exact", "truncated", "shaped"):
            raise ValueError(f"ratio_mode is {self.ratio_mode!r}; allowed: current, exact, truncated, shaped.")
        for name in ("ratio_truncation", "ratio_gamma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")


@dataclass
class _Step:
    """What a generation batch holds beside TRL's tensors; lists are over the rows of this process."""

    rows: Sequence[Mapping[str, Any]]
    guided: dict[int, Trajectory] = field(default_factory=dict)
    overwritten: dict[int, tuple[list[int], bool]] = field(default_factory=dict)
    gated: int = 0
    rewards: torch.Tensor | None = None
    correct: torch.Tensor | None = None


class NPOTrainer(GRPOTrainer):
    """Drop-in for TRL's `GRPOTrainer` that replaces the last slot of gated groups by a guide trajectory.

    Args:
        guidance (`GuidanceSource`, *optional*): Where guides come from, such as a `GuidanceCache`. Without one the
            trainer trains exactly as `GRPOTrainer`. May be set between steps through the attribute of this name.
        verifier (`Callable`, *optional*): `verifier(response text, row) -> Verdict`. Needed with guidance: it gives the
            pass rate for the gate. With a verifier, `npo/pass_rate` and `npo/all_wrong_groups` are logged.
        rollout_sink (`Callable`, *optional*): Called as `sink(policy_step, rows)` with a table of the step's rollouts
            while the attribute `record_rollouts` is True.
        **kwargs: Arguments of `GRPOTrainer`. `train_dataset` needs the columns uid, prompt and answer.

    Raises:
        ValueError: Guidance without verifier; a data set without uid, prompt or answer; a group that would be split
            over two batches or processes; tools, environments or the liger loss together with guidance.
    """

    _tag_names = ["trl", "grpo", "npo"]  # noqa: RUF012 (TRL's own form)
    _name = "NPO"

    def __init__(
        self,
        *args: Any,
        guidance: GuidanceSource | None = None,
        verifier: Verifier | None = None,
        rollout_sink: Callable[[int, list[dict[str, Any]]], None] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, NPOConfig):
            raise TypeError(f"args is a {type(self.args).__name__}; NPOTrainer needs an NPOConfig.")
        self.verifier = verifier
        self.rollout_sink = rollout_sink
        self.record_rollouts = False
        self.group_pass_rates: dict[str, float] = {}
        self._rollouts: _Step | None = None
        self._loss_inputs: dict[str, Any] | None = None
        self._recording: dict[str, Any] | None = None
        self.guidance = guidance

    @property
    def guidance(self) -> GuidanceSource | None:
        """Where guides come from; None trains as GRPOTrainer does. May be set between steps."""
        return self._guidance

    @guidance.setter
    def guidance(self, source: GuidanceSource | None) -> None:
        if source is not None:
            self._check_guided()
        self._guidance = source

    def _check_guided(self) -> None:
        if self.verifier is None:
            raise ValueError("guidance is given without a verifier; NPO gates on verified pass rates. Pass verifier=….")
        if self.tools or self.environments is not None:
            raise ValueError("NPO replaces whole responses; tools and environments are not supported with guidance.")
        batch = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if batch % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size × steps_per_generation = {batch} is not a multiple of "
                f"num_generations = {self.num_generations}, so a group would be split over two processes. "
                "Change one of the three."
            )
        if hasattr(self.train_dataset, "column_names") and self.train_dataset.column_names is not None:
            require_columns(self.train_dataset)

    # Rollouts: gate and replacement

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rollouts = step = _Step(rows=inputs)
        output = super()._generate_and_score_completions(inputs)
        ids = output["completion_ids"]
        is_guide = torch.zeros(len(inputs), dtype=torch.bool, device=ids.device)
        guide_logps = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        for row, guide in step.guided.items():
            is_guide[row] = True
            guide_logps[row, : len(guide.logps)] = torch.tensor(guide.logps, device=ids.device)
        output["is_guide"] = is_guide
        output["guide_logps"] = guide_logps
        if self.model.training:
            self._log_groups(step, is_guide)
            if self.record_rollouts and self.rollout_sink is not None:
                output["rollout_row"] = torch.arange(len(inputs), device=ids.device)
                self._start_recording(step, output)
        return output

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.guidance is not None and self.model.training:
            for row, guide in self._choose_guides(completion_ids).items():
                completion_ids[row] = list(guide.token_ids)
                if logprobs is not None:
                    # TRL reads None as "unknown" and sets the sampler-mismatch ratio of these tokens to exactly 1
                    logprobs[row] = [None] * len(guide.token_ids)
        return completion_ids, logprobs

    def _choose_guides(self, completion_ids: list[list[int]]) -> dict[int, Trajectory]:
        """Guides by row number for the groups of this process: gated, and with a guide in the source."""
        step, n = self._rollouts, self.num_generations
        guides = [
            self.guidance.guide(step.rows[row]["uid"], self.state.global_step) for row in range(0, len(step.rows), n)
        ]
        asked = [group for group, guide in enumerate(guides) if guide is not None]
        if not asked:
            return {}
        rows = [group * n + slot for group in asked for slot in range(n)]
        texts = self.processing_class.batch_decode([completion_ids[row] for row in rows], skip_special_tokens=True)
        verdicts = [self.verifier(text, step.rows[row]).correct for text, row in zip(texts, rows, strict=True)]
        correct = torch.tensor(verdicts).view(len(asked), n)
        gated = gate(pass_rate(correct), torch.ones(len(asked), dtype=torch.bool), self.args.tau_gate)
        step.gated = int(gated.sum())
        for local_row in guide_rows(gated, n).tolist():
            row, guide = rows[local_row], guides[asked[local_row // n]]
            self._check_guide(guide, step.rows[row]["uid"])
            step.guided[row] = guide
            step.overwritten[row] = (completion_ids[row], bool(correct.view(-1)[local_row]))
        return step.guided

    def _check_guide(self, guide: Trajectory, uid: str) -> None:
        if guide.uid != uid or not guide.correct:
            raise GuidanceRefused(f"The source gave a guide of {guide.uid!r} (correct: {guide.correct}) for {uid!r}.")
        if not guide.token_ids or len(guide.logps) != len(guide.token_ids):
            raise GuidanceRefused(
                f"The guide of {uid!r} has {len(guide.token_ids)} tokens and {len(guide.logps)} log-probs; "
                "it needs at least one token, and a log-prob for each."
            )
        if len(guide.token_ids) > self.max_completion_length or guide.token_ids[-1] not in self.eos_token_ids:
            raise GuidanceRefused(
                f"The guide of {uid!r} has {len(guide.token_ids)} tokens and ends with token {guide.token_ids[-1]}; "
                f"at most {self.max_completion_length} tokens ending in one of {self.eos_token_ids} fit a group."
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        step = self._rollouts
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        step.rewards = (rewards[own] * self.reward_weights.to(rewards.device).unsqueeze(0)).nansum(dim=1)
        if self.verifier is not None:
            verdicts = [
                self.verifier(completion_text(completion), row).correct
                for completion, row in zip(completions, inputs, strict=True)
            ]
            step.correct = torch.tensor(verdicts, device=rewards.device)
            for row, guide in step.guided.items():
                if not step.correct[row]:
                    raise GuidanceRefused(f"The guide of {guide.uid!r} is wrong at injection: {guide.text!r}.")
        return rewards

    # Metrics

    def _log_groups(self, step: _Step, is_guide: torch.Tensor) -> None:
        """On-policy metrics of a generation batch, over all processes."""
        own = ~is_guide
        sums = [
            step.rewards[own].sum(),
            own.sum(),
            is_guide.sum(),
            torch.tensor(step.gated),
            torch.tensor(0),
            torch.tensor(0),
        ]
        groups = len(is_guide) // self.num_generations
        self.group_pass_rates = {}
        if step.correct is not None:
            on_policy = step.correct.clone()
            for row, (_, was_correct) in step.overwritten.items():
                on_policy[row] = was_correct
            rates = pass_rate(on_policy.view(groups, self.num_generations))
            sums[4], sums[5] = rates.sum(), (rates == 0).sum()
            uids = [step.rows[group * self.num_generations].get("uid") for group in range(groups)]
            self.group_pass_rates = {
                uid: rate for uid, rate in zip(uids, rates.tolist(), strict=True) if uid is not None
            }
        totals = torch.stack([value.to(is_guide.device, torch.float64) for value in [*sums, torch.tensor(groups)]])
        reward, rows, replaced, gated, rate, wrong, groups = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = self._metrics["train"]
        metrics["npo/reward"].append(reward / max(rows, 1))
        metrics["npo/replaced_slots"].append(replaced)
        metrics["npo/gated_groups"].append(gated / groups)
        if step.correct is not None:
            metrics["npo/pass_rate"].append(rate / groups)
            metrics["npo/all_wrong_groups"].append(wrong / groups)

    def _log_tokens(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Entropy of on-policy tokens, and divergence of guide tokens, over all processes."""
        mask = self._token_mask(inputs)
        guide = inputs["is_guide"].unsqueeze(1) & mask
        own = ~inputs["is_guide"].unsqueeze(1) & mask
        log_ratio = (logps - inputs["guide_logps"])[guide].double()
        weight = log_ratio.clamp(max=MAX_LOG_WEIGHT).exp()
        sums = [entropies[own].sum(), own.sum(), guide.sum(), log_ratio.sum(), weight.sum(), weight.square().sum()]
        totals = torch.stack([value.detach().to(logps.device, torch.float64) for value in sums])
        entropy, tokens, guided, log_sum, weights, squares = self.accelerator.reduce(totals, reduction="sum").tolist()
        metrics = self._metrics["train"]
        metrics["npo/entropy"].append(entropy / tokens if tokens else float("nan"))
        if guided:
            metrics["npo/guide_kl"].append(-log_sum / guided)
            metrics["npo/guide_ratio"].append(weights / guided)
            metrics["npo/guide_ess"].append(weights**2 / squares / guided)

    @staticmethod
    def _token_mask(inputs: Mapping[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    # Loss: the ratio of the guide rows

    def _compute_loss(self, model, inputs):
        self._loss_inputs = inputs = dict(inputs)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # TRL asks for log-probs outside the loss too (old and reference policy): there is nothing to do then
        if self._loss_inputs is not None and model.training:
            self._log_tokens(logps.detach(), entropies.detach(), self._loss_inputs)
            if self.args.ratio_mode != "current" and self._loss_inputs["is_guide"].any():
                self._set_guide_ratio(logps.detach(), self._loss_inputs)
            if self._recording is not None:
                self._record(logps.detach(), self._loss_inputs)
        return logps, entropies, aux_loss

    def _set_guide_ratio(self, logps: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Give the guide rows of a loss call the ratio of the chosen mode.

        Mode exact puts the guide's own log-probs in the denominator, and TRL clips as for every row. The other modes
        are not clipped: the ratio is 1 in value and the weight's derivative goes into per-token advantages, which gives
        the exact gradient of (weight × advantage).
        """
        rows = inputs["is_guide"].unsqueeze(1)
        old = inputs.get("old_per_token_logps")
        old = logps if old is None else old
        if self.args.ratio_mode == "exact":
            inputs["old_per_token_logps"] = torch.where(rows, inputs["guide_logps"].to(logps.dtype), old)
            return
        weight = gradient_weight(
            logps,
            inputs["guide_logps"].to(logps.dtype),
            self._token_mask(inputs),
            self.args.ratio_mode,
            truncation=self.args.ratio_truncation,
            gamma=self.args.ratio_gamma,
        )
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        inputs["old_per_token_logps"] = torch.where(rows, logps, old)
        inputs["advantages"] = torch.where(rows, advantages * weight.to(advantages.dtype), advantages)

    # Rollout tables

    def _start_recording(self, step: _Step, output: Mapping[str, Any]) -> None:
        n = self.num_generations
        mask = output["completion_mask"].bool()
        rows = []
        for row, data in enumerate(step.rows):
            guide = step.guided.get(row)
            lost_ids, lost_correct = step.overwritten.get(row, (None, None))
            rows.append(
                {
                    "uid": data.get("uid"),
                    "group": row // n,
                    "slot": row % n,
                    "source": "policy" if guide is None else "guide",
                    "guide_step": None if guide is None else guide.source_step,
                    "token_ids": output["completion_ids"][row][mask[row]].tolist(),
                    "behaviour_logps": None if guide is None else list(guide.logps),
                    "reward": float(step.rewards[row]),
                    "advantage": float(output["advantages"][row]),
                    "overwritten_ids": lost_ids,
                    "overwritten_correct": lost_correct,
                }
            )
        self._recording = {"step": self.state.global_step + 1, "rows": rows, "missing": len(rows)}

    def _record(self, logps: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Add current log-probs and ratios; hand the table over when every row has been seen."""
        mask = self._token_mask(inputs)
        for place, row in enumerate(inputs["rollout_row"].tolist() if "rollout_row" in inputs else []):
            record = self._recording["rows"][row]
            if "current_logps" in record:
                continue
            current = logps[place][mask[place]]
            old = inputs.get("old_per_token_logps")
            behaviour = current if old is None else old[place][mask[place]]
            record["current_logps"] = current.tolist()
            if record["behaviour_logps"] is None:
                record["behaviour_logps"] = behaviour.tolist()
            record["ratio"] = (current - torch.tensor(record["behaviour_logps"]).to(current)).exp().tolist()
            self._recording["missing"] -= 1
        if self._recording["missing"] == 0:
            recording, self._recording = self._recording, None
            self.rollout_sink(recording["step"], recording["rows"])
