"""NPOTrainer: TRL's GRPOTrainer with near-future guidance in the last slot of gated groups.

What is added to plain GRPO, and nothing else:

1. After the rollouts of a step are sampled, each group whose on-policy pass rate (over all n rollouts) is at most
   `tau_gate` and for which the source has a guide gets its last rollout replaced by the guide's token ids.
2. In the loss, the guide rows get the importance ratio of the chosen mode.
3. On-policy metrics `npo/…`, from which guide rows are excluded.

The baselines are other settings of the same three: another source, another gate, guides appended instead of replacing.

No method of TRL is copied. Without guidance the weights are bit-identical to GRPOTrainer's where sampling draws any
token, or with `mask_unsampled=False`. TRL calls the five hooks in this order, and each sets what later ones read:

1. `_generate_and_score_completions`, once a generation batch: sets `_rollouts`, with replayed prompts; at its end, the
   tensors is_guide, is_own and guide_logps of the batch, the group metrics, and the table to be filled.
2. `_generate_single_turn`, inside of 1: verdicts, guides and empty places in `_rollouts`, their ids in TRL's list.
3. `_calculate_rewards`, inside of 1: no reward for empty places; rewards and verdicts of all rows in `_rollouts`.
4. `_compute_loss`, once a pass: sets `_loss_inputs`, a copy of the pass's tensors that may be changed.
5. `_get_per_token_logps_and_entropies`, inside of 4 (TRL calls it in 1 too, where nothing is set): the ratio of guide
   rows in `_loss_inputs`, the token metrics, the log-probs of the table.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage] (TRL loads its names late)

from ..guidance.sources import GuidanceSource, ManyGuides, ReplaySource
from ..guidance.trajectories import GuidanceCache, Trajectory, uid_of
from ..guidance.verdicts import Verifier, completion_text, is_correct, require_verifier
from ..method.groups import empty_places, gate, pass_rate, place_guides
from ..method.ratios import MAX_LOG_WEIGHT, gradient_weight
from .admission import RefusedGuides, check_arguments, check_guide, check_source, empty_cache
from .config import PAPER, NPOConfig, own_arguments
from .pictures import collapse_pictures, keep_pictures_out, left_out, left_out_of_loss, rows_as_seen
from .rollouts import RolloutTable, StepRollouts, mask_given, response_texts, widest


class NPOTrainer(GRPOTrainer):
    """Drop-in for TRL's `GRPOTrainer` that replaces the last slot of gated groups by a guide trajectory.

    Args:
        guidance (`GuidanceSource`, *optional*): Where guides come from, such as a `GuidanceCache`. Without one the
            trainer trains as `GRPOTrainer`, but for `mask_unsampled`. May be set between steps by this name.
        verifier (`Callable`, *optional*): `verifier(response text, row) -> Verdict` or bool, in training only; the text
            is what rewards get (`rollouts.response_texts`). Needed with guidance: it gives the pass rate for the gate,
            and judges each guide again before it is injected; a wrong one is left out and counted
            (`npo/refused_guides`). With a verifier, `npo/pass_rate` and `npo/all_wrong_groups` are logged.
        rollout_sink (`Callable`, *optional*): Called as `sink(policy_step, rows)` with a table of each generated batch,
            but of those in whose steps the attribute `record_rollouts` is False. The attribute `guided_sink`, if set,
            is called as `sink(policy_step, rows, refused)` after each batch in which a guide was placed or refused, in
            each process with its own: rows of the guided groups, and the refused guides.
        **kwargs: Arguments of `GRPOTrainer`. Without `args`, or with a `GRPOConfig`, NPO's own settings have their
            defaults. With guidance, `train_dataset` needs the columns uid and prompt, and answer where the verifier is
            `BoxedVerifier`.

    Raises:
        TypeError: `args` of another kind; a verifier that cannot be called so; guidance that has no guides.
        ValueError: What `admission.check_source` refuses; with a verifier remove_unused_columns, or a group that would
            be split over processes; appended places with that, a `rollout_func`, tools or environments.
        GuidanceRefused: While training: a source gives what is no guide for the prompt, or all its guides are wrong.
    """

    _tag_names = ["trl", "grpo", "npo"]  # noqa: RUF012 (TRL's own form)
    _name = "NPO"
    _paper = PAPER

    # what a trainer has once it is made, and TRL and transformers declare wider
    args: NPOConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    train_dataset: Dataset | IterableDataset
    num_generations: int
    max_completion_length: int
    chat_template_kwargs: dict[str, Any]
    _rollouts: StepRollouts

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *further: Any,
        guidance: GuidanceSource | None = None,
        verifier: Verifier | None = None,
        rollout_sink: Callable[[int, list[dict[str, Any]]], None] | None = None,
        **kwargs: Any,
    ):
        if verifier is not None:
            require_verifier(verifier)
        super().__init__(model, reward_funcs, own_arguments(args, model), *further, **kwargs)
        keep_pictures_out(self)
        if self.is_fsdp_enabled:
            from .fsdp import gather_heads  # others need not load it

            gather_heads(self)
        self.verifier, self.rollout_sink = verifier, rollout_sink
        self.record_rollouts = True
        self.guided_sink: Callable[[int, list[dict[str, Any]], list[Trajectory]], None] | None = None
        self.group_pass_rates: dict[str, float] = {}
        self._loss_inputs: dict[str, Any] | None = None
        self._recording: RolloutTable | None = None
        self._token_sums: torch.Tensor | None = None
        check_arguments(self, verifier)
        self.guidance = guidance

    @property
    def guidance(self) -> GuidanceSource | None:
        """Where guides come from; None trains as GRPOTrainer does. May be set between steps."""
        return self._guidance

    @guidance.setter
    def guidance(self, source: GuidanceSource | None) -> None:
        if source is not None:
            check_source(self, source)
        self._guidance = source
        self._refused = RefusedGuides()

    def new_cache(self, kind: type[GuidanceCache] = GuidanceCache) -> GuidanceCache:
        """A cache without guides for this trainer: ends of sequence, longest response, tokenizer and prompts are its.

        Fill it with rollouts that `sample_rollouts` scored at `score_temperature=args.temperature` on prompts with
        this trainer's `chat_template_kwargs`, and set it as `guidance`.
        """
        return empty_cache(self, kind)

    # Rollouts: gate and replacement

    @property
    def _own_slots(self) -> int:
        """Rows of a group that the policy samples; with placement append the last ones are kept for guides."""
        return self.num_generations - (self.args.guides_per_group if self.args.placement == "append" else 0)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = rows_as_seen(self._with_replayed_prompts(inputs))
        self._rollouts = step = StepRollouts(rows=inputs, training=self.model.training)
        output = super()._generate_and_score_completions(inputs)
        if not step.training:
            self.model.eval()  # continuous batching leaves it in training mode in the middle of an evaluation
        replaced = step.mark(output)
        if self.args.guide_prefix < 1 or self.args.placement == "append":
            mask_given(output, step.prefixes, step.void, self.accelerator)
        if step.training:
            self._log_groups(step, replaced, output["is_own"], output["advantages"])
            whole = (self.record_rollouts and self.rollout_sink is not None) or isinstance(self.guidance, ReplaySource)
            if whole or (self.guided_sink is not None and (step.guided or step.refused)):
                output["rollout_row"] = torch.arange(len(inputs), device=replaced.device)
                decode = partial(self.processing_class.batch_decode, skip_special_tokens=True)
                place = self.state.global_step + 1, step, output, self.num_generations
                first = self.accelerator.process_index * (len(inputs) // self.num_generations)
                self._recording = RolloutTable(*place, decode, self.eos_token_ids, not whole, first)
        return output

    def _with_replayed_prompts(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The step's rows, some groups of which a replaying source has given another prompt."""
        if not isinstance(self.guidance, ReplaySource) or not self.model.training:
            return inputs
        from .sampling import completion_entropies  # for a replaying source alone: others need not load it

        n, batch, template = self.num_generations, self.args.per_device_train_batch_size, self.chat_template_kwargs
        model, processor = self.accelerator.unwrap_model(self.model), self.processing_class
        same = {"chat_template_kwargs": template, "unsampled": left_out_of_loss(self)}
        entropies = partial(completion_entropies, model, processor, batch=batch, **same)
        chosen = self.guidance.replay([uid_of(row) for row in inputs[::n]], self.state.global_step, entropies)
        rows = list(inputs)
        for group, row in chosen.items():
            rows[group * n : (group + 1) * n] = [dict(row) for _ in range(n)]
        return rows

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self._rollouts.prompt_ids = prompt_ids
        if self.use_vllm and self.vllm_mode == "colocate":
            prompt_ids = collapse_pictures(prompt_ids, self.processing_class)
        # accelerate opens autocast for each token's pass, and casts all weights each time; here once for all tokens
        with self.accelerator.autocast() if self.accelerator.device.type == "cpu" else nullcontext():
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self._rollouts.training:
            if self.guidance is not None:
                self._choose_guides(completion_ids)
            step, n = self._rollouts, self.num_generations
            guided = torch.tensor(list(step.guided), dtype=torch.int64)
            step.void = empty_places(guided, len(step.rows) // n, n, n - self._own_slots).tolist()
            fillings = {row: list(guide.token_ids) for row, guide in step.guided.items()}
            if self.args.guide_prefix < 1 and fillings:
                fillings = self._continue_guides()
            for row, tokens in {**dict.fromkeys(step.void, self.eos_token_ids[:1]), **fillings}.items():
                completion_ids[row] = list(tokens)
                if logprobs is not None:
                    # TRL reads None as "unknown" and sets the sampler-mismatch ratio of these tokens to exactly 1
                    logprobs[row] = [None] * len(tokens)
        return completion_ids, logprobs

    def _choose_guides(self, completion_ids: list[list[int]]) -> None:
        """Guides by row for the groups of this process: gated, and with a guide in the source."""
        step, n, count = self._rollouts, self.num_generations, self.args.guides_per_group
        guides = [self._guides_for(uid_of(step.rows[row]), count) for row in range(0, len(step.rows), n)]
        offered = torch.tensor([len(found) for found in guides])
        asked = offered > 0
        if not asked.any():
            return
        own = self._own_slots
        rows = [row for row in range(len(step.rows)) if asked[row // n] and row % n < own]
        step.verdicts = self._verify({row: completion_ids[row] for row in rows})
        rates = torch.zeros(len(guides))
        rates[asked] = pass_rate(torch.tensor(list(step.verdicts.values())).view(-1, own))
        gated = gate(rates, asked, self.args.tau_gate)
        placed: dict[int, Trajectory] = {}
        for row, index in place_guides(gated, offered, n, count).tolist():
            placed[row] = guides[row // n][index]
            check_guide(self, placed[row], step.rows[row]["uid"])
        for row, right in self._verify({row: guide.token_ids for row, guide in placed.items()}).items():
            if not right:
                step.refused.append(placed[row])
                continue
            step.guided[row] = placed[row]
            if row in step.verdicts:
                step.overwritten[row] = (completion_ids[row], step.verdicts[row])
            step.verdicts[row] = True

    def _continue_guides(self) -> dict[int, list[int]]:
        """Responses by row that begin as the row's guide and that the policy ends; they are judged anew."""
        from .prefixes import beginning, continued  # load what samples off line, for prefix guidance alone

        step, share = self._rollouts, self.args.guide_prefix
        prefixes = {row: beginning(guide, share) for row, guide in step.guided.items()}
        responses = continued(self, [step.rows[row] for row in prefixes], list(prefixes.values()))
        step.prefixes = {row: len(prefix) for row, prefix in prefixes.items()}
        found = dict(zip(prefixes, responses, strict=True))
        step.verdicts |= self._verify(found)
        return found

    def _verify(self, responses: Mapping[int, Sequence[int]]) -> dict[int, bool]:
        """Verdicts on token ids by row: on the text that rewards get, off line too."""
        rows, prompts, verifier = self._rollouts.rows, self._rollouts.prompt_ids, self.verifier
        assert verifier is not None  # asked for with guidance, or where there is one
        asked, before = [rows[row] for row in responses], lambda: [prompts[row] for row in responses]
        texts = response_texts(self.processing_class, asked, list(responses.values()), before)
        return {row: is_correct(verifier(text, rows[row])) for row, text in zip(responses, texts, strict=True)}

    def _guides_for(self, uid: str, count: int) -> Sequence[Trajectory]:
        source, done = self.guidance, self.state.global_step
        assert source is not None
        if count > 1:
            return cast(ManyGuides, source).guides(uid, done, count)  # as `check_source` found it
        guide = source.guide(uid, done)
        return [] if guide is None else [guide]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        step = self._rollouts
        step.responses = completion_ids_list
        own = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        if self.args.placement == "append":
            # TRL leaves a row without any reward out of the group's mean and std, and gives it advantage 0
            void = torch.zeros(len(inputs), dtype=torch.bool, device=rewards.device)
            void[step.void] = True
            rewards = rewards.masked_fill(cast(torch.Tensor, self.accelerator.gather(void)).unsqueeze(1), float("nan"))
        weighted = (rewards[own] * self.reward_weights.to(rewards.device).unsqueeze(0)).nansum(dim=1)
        step.rewards = weighted.masked_fill(rewards[own].isnan().all(dim=1), float("nan"))
        if self.verifier is not None and step.training:
            verdicts = dict.fromkeys(step.void, False) | step.verdicts
            for row in range(len(inputs)):
                if row not in verdicts:  # what rewards get: of a conversation with tools the policy's part alone
                    verdicts[row] = is_correct(self.verifier(completion_text(completions[row]), inputs[row]))
            step.correct = torch.tensor([verdicts[row] for row in range(len(inputs))], device=rewards.device)
        return rewards

    # Metrics

    def _log_groups(
        self, step: StepRollouts, is_guide: torch.Tensor, own: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """On-policy metrics of a generation batch, over all processes; rows that no reward scored are in no mean."""
        assert step.rewards is not None
        scored = own & ~step.rewards.isnan()
        groups = len(is_guide) // self.num_generations
        sums = {
            "reward": step.rewards[scored].sum(),
            "scored": scored.sum(),
            "guides": is_guide.sum(),
            "refused": torch.tensor(len(step.refused)),
            "advantage": advantages[is_guide].sum(),
            "solved": torch.tensor(sum(step.verdicts[row] for row in step.prefixes)),
            "groups": torch.tensor(groups),
        }
        self.group_pass_rates = {}
        if step.correct is not None:
            rates = pass_rate(step.on_policy().view(groups, self.num_generations)[:, : self._own_slots])
            gated = gate(rates, torch.ones_like(rates, dtype=torch.bool), self.args.tau_gate)
            sums |= {"gated": gated.sum(), "rate": rates.sum(), "wrong": (rates == 0).sum()}
            uids = [step.rows[group * self.num_generations].get("uid") for group in range(groups)]
            own_rates = {uid: rate for uid, rate in zip(uids, rates.tolist(), strict=True) if uid is not None}
            self.group_pass_rates = {uid: rate for part in gather_object([own_rates]) for uid, rate in part.items()}
        values = torch.stack([value.to(own.device, widest(own.device)) for value in sums.values()])
        values = cast(torch.Tensor, self.accelerator.reduce(values, reduction="sum"))
        total, metrics = dict(zip(sums, values.tolist(), strict=True)), self._metrics["train"]
        guides, refused = int(total["guides"]), int(total["refused"])
        metrics["npo/reward"].append(total["reward"] / total["scored"] if total["scored"] else float("nan"))
        metrics["npo/replaced_slots"].append(total["guides"])
        if step.correct is not None:
            metrics["npo/gated_groups"].append(total["gated"] / total["groups"])
            metrics["npo/pass_rate"].append(total["rate"] / total["groups"])
            metrics["npo/all_wrong_groups"].append(total["wrong"] / total["groups"])
        if guides or refused:
            metrics["npo/refused_guides"].append(total["refused"])
            metrics["npo/guide_advantage"].append(total["advantage"] / guides if guides else float("nan"))
            if step.prefixes or self.args.guide_prefix < 1:
                metrics["npo/prefix_solved"].append(total["solved"] / guides if guides else float("nan"))
            self._refused.count(guides, refused, next(iter(step.refused), None))

    def _log_tokens(self, logps: torch.Tensor, entropies: torch.Tensor, inputs: Mapping[str, Any]) -> None:
        """Entropy of on-policy tokens, and divergence of guide tokens, over all passes and processes of a step."""
        mask = self._token_mask(inputs)
        guide = inputs["is_guide"].unsqueeze(1) & mask
        own = inputs["is_own"].unsqueeze(1) & mask
        log_ratio = (logps - inputs["guide_logps"])[guide].to(widest(logps.device))
        weight = log_ratio.clamp(max=MAX_LOG_WEIGHT).exp()
        sums = [entropies[own].sum(), own.sum(), guide.sum(), log_ratio.sum(), weight.sum(), weight.square().sum()]
        part = torch.stack([value.detach().to(logps.device, widest(logps.device)) for value in sums])
        totals = part if self._token_sums is None else self._token_sums + part
        self._token_sums = None if self.accelerator.sync_gradients else totals
        if not self.accelerator.sync_gradients:
            return  # more passes of this step follow
        totals = cast(torch.Tensor, self.accelerator.reduce(totals, reduction="sum")).tolist()
        entropy, tokens, guided, log_sum, weights, squares = totals
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
        with left_out(self.accelerator.unwrap_model(model), left_out_of_loss(self)):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # TRL asks for log-probs outside the loss too (old and reference policy): there is nothing to do then
        if self._loss_inputs is not None and model.training:
            self._log_tokens(logps.detach(), entropies.detach(), self._loss_inputs)
            if self.args.ratio_mode != "current" and self._loss_inputs["is_guide"].any():
                self._set_guide_ratio(logps.detach(), self._loss_inputs)
            if self._recording is not None and self._recording.see(
                logps.detach(), self._token_mask(self._loss_inputs), self._loss_inputs
            ):
                self._hand_over(self._recording)
        return logps, entropies, aux_loss

    def _set_guide_ratio(self, logps: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Give the guide rows of a loss call the ratio of the chosen mode.

        Mode exact puts the guide's own log-probs in the denominator, the ratio saturating at e^20, and TRL clips as for
        every row. The other modes are not clipped: the ratio is 1 in value and the weight's derivative goes into
        per-token advantages, which gives the exact gradient of (weight × advantage).
        """
        rows = inputs["is_guide"].unsqueeze(1)
        old = inputs.get("old_per_token_logps")
        old = logps if old is None else old
        behaviour = inputs["guide_logps"].to(logps.dtype)
        if self.args.guide_behaviour == "one":
            behaviour = torch.zeros_like(behaviour)
        if self.args.ratio_mode == "exact":
            behaviour = torch.maximum(behaviour, logps - MAX_LOG_WEIGHT)  # beyond, e^88, float32 has no ratio
            inputs["old_per_token_logps"] = torch.where(rows, behaviour, old)
            return
        mask, mode = self._token_mask(inputs), self.args.ratio_mode
        most, gamma = self.args.ratio_truncation, self.args.ratio_gamma
        weight = gradient_weight(logps, behaviour, mask, mode, truncation=most, gamma=gamma)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        inputs["old_per_token_logps"] = torch.where(rows, logps, old)
        inputs["advantages"] = torch.where(rows, advantages * weight.to(advantages.dtype), advantages)

    def _hand_over(self, table: RolloutTable) -> None:
        self._recording = None
        if isinstance(self.guidance, ReplaySource):
            self.guidance.observe(table.step, table.rows)
        if self.record_rollouts and self.rollout_sink is not None:
            self.rollout_sink(table.step, table.rows)
        if self.guided_sink is not None and ((guided := table.guided_rows()) or table.refused):
            self.guided_sink(table.step, guided, table.refused)
