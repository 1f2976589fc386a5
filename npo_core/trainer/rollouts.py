"""The rollouts of a step: their text as rewards get it, and their table, filled while the loss goes over them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from trl.chat_template_utils import parse_response

from ..guidance.fingerprints import tokenizer_of
from ..guidance.trajectories import Trajectory
from ..guidance.verdicts import completion_text

WITHOUT_DOUBLE = ("mps",)
"""Kinds of devices that have no numbers of 64 bits: Apple's GPUs."""


def widest(device: torch.device) -> torch.dtype:
    """Type that the sums behind metrics are taken in: double precision, where the device has it."""
    return torch.float32 if device.type in WITHOUT_DOUBLE else torch.float64


@dataclass
class StepRollouts:
    """What a generation batch holds beside TRL's tensors; lists and keys are over the rows of this process.

    Attributes:
        rows: Data set rows.
        guided: Guides by row.
        overwritten: Token ids of the rollout that a guide took the place of, and whether it was correct, by row.
        void: Rows that hold nothing: places for appended guides in groups that have none.
        prefixes: Tokens that a guide gave, by row, where the policy went on by itself.
        refused: Guides that were judged wrong, so that the sampled rollout stayed.
        verdicts: Verdicts on the rows of groups that have a guide, by row; those of the guides once they are in.
        prompt_ids: Token ids of each row's prompt, as TRL made them; empty where a `rollout_func` samples.
        responses: Token ids of each row's response, those that are kept out of the loss included.
        rewards: Weighted reward of each row; NaN where no reward function scored it.
        correct: Verdict on each row, or None without a verifier.
        training: Whether they are sampled for training; an evaluation has no guides and no metrics of ours.
    """

    rows: Sequence[Mapping[str, Any]]
    guided: dict[int, Trajectory] = field(default_factory=dict)
    overwritten: dict[int, tuple[list[int], bool]] = field(default_factory=dict)
    void: list[int] = field(default_factory=list)
    prefixes: dict[int, int] = field(default_factory=dict)
    refused: list[Trajectory] = field(default_factory=list)
    verdicts: dict[int, bool] = field(default_factory=dict)
    prompt_ids: Sequence[Sequence[int]] = ()
    responses: Sequence[Sequence[int]] = ()
    rewards: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    training: bool = True

    def mark(self, output: dict[str, Any]) -> torch.Tensor:
        """Add to TRL's tensors which rows are guides' and which the policy's own, and the guides' log-probs.

        A row that a guide only began is neither: what is trained on there is the policy's, and has no ratio of a guide.

        Args:
            output: TRL's tensors of the batch; gets `is_guide` and `is_own`, shape (rows,), and `guide_logps`, in nats,
                0 elsewhere, shape (rows, tokens).

        Returns:
            Rows that a guide took or began, shape (rows,).
        """
        ids = output["completion_ids"]
        replaced = torch.zeros(len(self.rows), dtype=torch.bool, device=ids.device)
        replaced[list(self.guided)] = True
        output["is_guide"], output["is_own"] = replaced.clone(), ~replaced
        output["is_guide"][list(self.prefixes)] = False
        output["is_own"][self.void] = False
        output["guide_logps"] = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        for row in self.guided.keys() - self.prefixes.keys():
            logps = torch.tensor(self.guided[row].logps, device=ids.device)
            output["guide_logps"][row, : len(logps)] = logps
        return replaced

    def on_policy(self) -> torch.Tensor:
        """Verdicts on what the policy sampled, shape (rows,): where a guide took a slot, on what was there."""
        assert self.correct is not None
        verdicts = self.correct.clone()
        for row, (_, was_correct) in self.overwritten.items():
            verdicts[row] = was_correct
        return verdicts


def mask_given(
    output: dict[str, Any], prefixes: Mapping[int, int], void: Sequence[int], accelerator: Accelerator
) -> None:
    """Keep what guides gave and what stands in empty places out of the loss, as TRL keeps out what tools said.

    An advantage of 0 would not do: the KL penalty and the entropy bonus ask for none.

    Args:
        output: TRL's tensors of a generation batch; gets `tool_mask`, and its count of tokens is set right.
        prefixes: Tokens that a guide gave, by row.
        void: Rows that hold nothing.
        accelerator: Adds up over the processes.
    """
    before = output.get("tool_mask")  # TRL's, where tools or an environment have spoken
    before = torch.ones_like(output["completion_mask"]) if before is None else before
    own = before.clone()
    own[list(void)] = 0
    for row, length in prefixes.items():
        own[row, :length] = 0
    output["tool_mask"] = own
    given = (output["completion_mask"] * (before - own)).sum()
    output["num_items_in_batch"] = output["num_items_in_batch"] - accelerator.reduce(given, reduction="sum")


class RolloutTable:
    """Rows of one step: uid, group, slot, source, tokens, log-probs, reward, advantage, ratio.

    Args:
        step: Policy step that the rollouts belong to, counted from 1.
        rollouts: The generation batch.
        output: TRL's tensors of that batch.
        n: Rows of a group.
        decode: Texts of responses, given their token ids.
        eos_token_ids: Token ids that end a response.
        guided_only: Only the groups that hold a guide; none, where all guides were refused.
        first: Number of this process's first group in the step.

    Attributes:
        refused: Guides that were judged wrong in this step.
    """

    def __init__(
        self,
        step: int,
        rollouts: StepRollouts,
        output: Mapping[str, Any],
        n: int,
        decode: Callable[[list[list[int]]], Sequence[str]],
        eos_token_ids: Sequence[int],
        guided_only: bool = False,
        first: int = 0,
    ):
        assert rollouts.rewards is not None
        self.step, self.refused = step, list(rollouts.refused)
        guided = {row // n for row in rollouts.guided}
        kept = [
            row
            for row in range(len(rollouts.rows))
            if row not in rollouts.void and (row // n in guided or not guided_only)
        ]
        ids = {row: list(rollouts.responses[row]) for row in kept}
        texts = dict(zip(kept, decode(list(ids.values())), strict=True)) if kept else {}
        self.rows: list[dict[str, Any]] = []
        # rows that are still to be seen; of a whole table the void ones too: a sink may wait for the other
        # processes, whose void rows come in other passes, so all end their tables in the last pass of the step
        self._place: dict[int, dict[str, Any] | None] = {} if guided_only else dict.fromkeys(rollouts.void)
        for row in kept:
            data, tokens = rollouts.rows[row], ids[row]
            guide, prefix = rollouts.guided.get(row), rollouts.prefixes.get(row)  # 0 of a guide that ends at once
            lost_ids, lost_correct = rollouts.overwritten.get(row, (None, None))
            record = {
                "uid": data.get("uid"),
                "group": first + row // n,
                "slot": row % n,
                "source": "policy" if guide is None else "guide" if prefix is None else "prefix",
                "prefix": prefix or 0,
                "guide_step": None if guide is None else guide.source_step,
                "token_ids": tokens,
                "text": texts[row],
                "ended": bool(tokens) and tokens[-1] in eos_token_ids,
                "correct": None if rollouts.correct is None else bool(rollouts.correct[row]),
                "behaviour_logps": None if guide is None or prefix is not None else list(guide.logps),
                "reward": float(rollouts.rewards[row]),
                "advantage": float(output["advantages"][row]),
                "overwritten_ids": lost_ids,
                "overwritten_correct": lost_correct,
            }
            self.rows.append(record)
            self._place[row] = record

    def guided_rows(self) -> list[dict[str, Any]]:
        """Rows of the groups that hold a guide, or a response that a guide began."""
        groups = {row["group"] for row in self.rows if row["source"] != "policy"}
        return [row for row in self.rows if row["group"] in groups]

    def see(self, logps: torch.Tensor, mask: torch.Tensor, inputs: Mapping[str, Any]) -> bool:
        """Add log-probs and ratios of the rows of a loss call; True when no row is missing any more.

        A whole table misses the void rows too until they come, so that all processes complete theirs in the same pass.

        Args:
            logps: Current log-probs, shape (rows, tokens), nats.
            mask: Response tokens, same shape.
            inputs: Tensors of the loss call; `rollout_row` holds each row's place in the generation batch.
        """
        old = inputs.get("old_per_token_logps")
        for place, row in enumerate(inputs["rollout_row"].tolist() if "rollout_row" in inputs else []):
            record = self._place.pop(row, None)
            if record is None:
                continue
            current = logps[place][mask[place]]
            behaviour = current if old is None else old[place][mask[place]]
            record["current_logps"] = current.tolist()
            if record["behaviour_logps"] is None:
                record["behaviour_logps"] = behaviour.tolist()
            record["ratio"] = (current - torch.tensor(record["behaviour_logps"]).to(current)).exp().tolist()
        return not self._place


def response_texts(
    processor,
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Sequence[int]],
    prompt_ids: Callable[[], Sequence[Sequence[int]]],
) -> list[str]:
    """Text of each response as TRL hands it to rewards, so that gate, guides and rewards judge the same.

    It is the decoded response; where the tokenizer has a response template (or schema) and the prompt is chat messages,
    the content that the template finds in it, such as what follows the reasoning.

    Args:
        processor: Processor or tokenizer.
        rows: The data set row of each response.
        completions: Token ids of the responses.
        prompt_ids: Gives the token ids of each response's prompt; asked only where a template reads them.
    """
    tokenizer = tokenizer_of(processor)
    # as TRL asks: neither attribute is there on every tokenizer
    parsed = any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))
    if not rows:
        return []
    if not parsed or isinstance(rows[0]["prompt"], str):
        return tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True)
    messages = [
        parse_response(tokenizer, list(ids), prefix=list(before))
        for ids, before in zip(completions, prompt_ids(), strict=True)
    ]
    return [completion_text([message]) for message in messages]
