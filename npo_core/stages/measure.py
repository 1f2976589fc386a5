"""Measure Q, V and S = Q/V between the checkpoints of a run: ours, or any folder of Hugging Face checkpoints.

Cost and memory. Each policy generates once for all pairs that it takes part in (an origin twice, for Q at distance 0);
a pair then costs two forward passes over stored tokens and a few per-sample gradients. While sampling one policy is in
memory, in a pair two: the policy and the source. Everything is written as it is made, under another name first, and a
second call goes on where the first one stopped.

Files of a measurement: `settings.json`, `policies.json` (fingerprints of weights), `samples/*.parquet` (rollouts of
each policy), `own/*.parquet` (on-policy gradients of each origin), `pairs/*.parquet` (`method.curve.SUMS`, a row per
prompt), `table.parquet` (a row per pair) and `signal.json` (fits, Δ*, calibrated c).
"""

import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig, PreTrainedModel

from ..declaration import require
from ..files import read_json, read_table, write_json, write_table
from ..guidance.trajectories import Trajectory, as_row
from ..guidance.verdicts import Verifier
from ..lock import Lock
from ..method.curve import RATIO_COLUMNS
from ..method.quantities import MEASURED_COSTS, Side
from ..method.signal import ratio_sums, shown, squared_deviations
from ..notebook import in_one_sentence
from ..processes import own_device
from ..progress import ProgressBar, progress
from ..runs.measurement import RESAMPLE, Pair, read_pairs, summarise
from ..runs.settings import GRADIENTS, WHERE_THEY_FIT, SignalSettings
from ..streams import MEASURED
from ..trainer.gradients import both_sided, gradients_misfit, own_gram, require_gradients_fit, source_gradients
from ..trainer.inputs import inherited
from ..trainer.prompts import Room, context_length, require_room
from ..trainer.sampling import ROLLOUT_BATCH, completion_logps, sample_rollouts
from ..world.computing import IN_FLOAT32, Computing
from ..world.policies import placed_policy
from ..world.pretrained import laid_out
from .comparable import check_policies, content_digest, fingerprint

COMPARED = ("scored", "gradients", "parameters")
"""Settings that only say how sampled rollouts are compared."""

logger = logging.getLogger(__name__)


def with_gradients(settings: SignalSettings, policy: Path) -> SignalSettings:
    """The settings with a number of gradients: the one asked for, else `GRADIENTS` where they fit, else none.

    Only the shapes of the policy are laid out. A frozen part of it counts as if it were trained.

    Raises:
        ValueError: `parameters` matches no parameter.
    """
    if settings.gradients != WHERE_THEY_FIT:
        return settings
    count = min(GRADIENTS, settings.prompts)
    model = laid_out(AutoConfig.from_pretrained(policy, trust_remote_code=False))
    misfit = gradients_misfit(model, settings.parameters, count, settings.max_new_tokens, own_device())
    if misfit:
        logger.warning(
            "V is taken from its proxies alone: %s. To measure it, select parameters by a regular expression of names "
            "(parameters), and ask for a number of gradients.",
            misfit,
        )
    return replace(settings, gradients=0 if misfit else count)


class Measurement:
    """One measurement in a folder: sample, compare, summarise.

    Args:
        folder: Where the files go.
        policies: Policy folders by name; a checkpoint is named by its step in six digits.
        pairs: What to compare.
        processor: Processor or tokenizer of all policies.
        rows: Data set rows: uid, prompt, answer and, for visual tasks, image.
        verifier: `verifier(text, row) -> Verdict`.
        settings: How to measure.
        load: `load(folder) -> model`; sets which parameters are trainable.
        quiet: Without a progress bar.
        rollout_batch: Responses that are sampled at a time, at most: fewer where memory asks for it.
        score_batch: Responses that are scored at a time, at most, in the same way.
        computing: Types that the policies compute in, those of the run; `load` gives their weights the first.
        unsampled: Tokens that log-probs leave out, see `sampling.completion_logps`.
        chat_template_kwargs: Template arguments of the prompts, as in training.

    Raises:
        ValueError: Policies that cannot be compared, too few rows, or a folder with rollouts of other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        policies: Mapping[str, Path],
        pairs: Sequence[Pair],
        processor: Any,
        rows: Sequence[Mapping[str, Any]],
        verifier: Verifier,
        settings: SignalSettings,
        load: Callable[[Path], PreTrainedModel] = placed_policy,
        quiet: bool = False,
        rollout_batch: int = ROLLOUT_BATCH,
        score_batch: int = ROLLOUT_BATCH,
        computing: Computing = IN_FLOAT32,
        unsampled: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        for name, batch in (("rollout_batch", rollout_batch), ("score_batch", score_batch)):
            require(batch >= 1, name, batch, "at least 1")
        if len(rows) < settings.prompts:
            raise ValueError(f"prompts is {settings.prompts}, but the data set has {len(rows)} rows; lower prompts.")
        needed = {f"{pair.origin:06d}" for pair in pairs} | {pair.source for pair in pairs} - {RESAMPLE}
        self.policies = {name: Path(policies[name]) for name in sorted(needed)}
        check_policies(self.policies, processor)
        self.folder, self.pairs = Path(folder), list(pairs)
        self.settings = settings = with_gradients(settings, next(iter(self.policies.values())))
        self.processor, self.verifier, self.load, self.quiet = processor, verifier, load, quiet
        self.rollout_batch, self.score_batch, self.computing = rollout_batch, score_batch, computing
        self._as_trained = {"unsampled": unsampled, "chat_template_kwargs": dict(chat_template_kwargs or {})}
        self.rows = [rows[index] for index in range(settings.prompts)]
        for name in ("samples", "own", "pairs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / "lock.json", f"The measurement {self.folder}")
        with self._lock.holding():
            self._keep_settings()

    def _keep_settings(self) -> None:
        """Note what is measured, or refuse a folder where something else was."""
        uids = [row["uid"] for row in self.rows]
        template = self._as_trained["chat_template_kwargs"]
        about = {"computing": asdict(self.computing), "chat_template_kwargs": template}
        about["asked"] = content_digest(self.rows)
        self._settle({"settings": self.settings.of_rollouts(), "uids": uids, **about})
        # policies may be added later, but a name must go on standing for the same weights
        known = self._read("policies.json")
        found = {name: fingerprint(path) for name, path in self.policies.items()}
        changed = sorted(name for name in found if known.get(name, found[name]) != found[name])
        if changed:
            raise ValueError(
                f"{self.folder} was measured with other weights under the names {changed}; give another folder for "
                "another run, or move that one away."
            )
        write_json(self.folder / "policies.json", {**known, **found})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def _settle(self, about: dict[str, Any]) -> None:
        """Note the settings in a new folder; in one that has some, keep what was sampled if it is of the same sampling.

        Pairs that were compared in another way (`COMPARED`) are taken out, to be compared again.
        """
        known, path = self._read("settings.json"), self.folder / "settings.json"
        if known:
            before, now = known["settings"], about["settings"]
            sampled = now.keys() - set(COMPARED)
            if known["uids"] != about["uids"] or any(before.get(name) != now[name] for name in sampled):
                raise ValueError(f"{path} holds other settings or prompts; give another folder, or move that one away.")
            if known.get("asked", about["asked"]) != about["asked"]:
                raise ValueError(
                    f"{self.folder} was measured on other prompts, answers or pictures under the same uids; give "
                    "another folder, or move that one away."
                )
            for name in ("computing", "chat_template_kwargs"):
                if (had := known.get(name, about[name])) != about[name]:
                    raise ValueError(
                        f"{self.folder} was measured with {name} {had}, now it is {about[name]}; give another folder, "
                        "or move that one away."
                    )
            if different := [name for name in COMPARED if before.get(name) != now[name]]:
                old = [*(self.folder / "pairs").glob("*.parquet"), *(self.folder / "own").glob("*.parquet")]
                logger.warning(
                    "%s: other %s than before. What was sampled is kept; pairs are compared again.",
                    self.folder,
                    ", ".join(different),
                )
                for file in old:
                    file.unlink()
        write_json(path, about)

    def run(self) -> dict[str, Any]:
        """Measure what is left to measure; return what `signal.json` holds. One process at a time does."""
        with in_one_sentence("signal", self._reached), self._lock.holding():
            return self._measure()

    def _reached(self) -> str:
        done = sum((self.folder / "pairs" / pair.file).exists() for pair in self.pairs)
        return f"pair {done} of {len(self.pairs)}"

    def _measure(self) -> dict[str, Any]:
        origins = list(dict.fromkeys(pair.origin for pair in self.pairs))
        names = [f"{origin:06d}" for origin in origins]
        samples = [(name, stream) for name in names for stream in (0, 1)]
        samples += [(name, 0) for name in self.policies if name not in names]
        if not all(self._sample_file(*each).exists() for each in samples):
            config = AutoConfig.from_pretrained(next(iter(self.policies.values())), trust_remote_code=False)
            template = self._as_trained["chat_template_kwargs"]
            room = Room(context_length(config), self.settings.max_new_tokens, template, "max_new_tokens")
            require_room(self.processor, self.rows, room)
        with progress(len(samples) + len(self.pairs), "signal", self.quiet) as bar:
            for name, stream in samples:
                self._sample(name, stream, bar)
                if stream == 0 and name in names:
                    self._require_failures(name)
            for origin in origins:
                self._compare([pair for pair in self.pairs if pair.origin == origin], bar)
        return self.summarise()

    # Rollouts

    def _sample_file(self, name: str, stream: int) -> Path:
        return self.folder / "samples" / f"{name}{f'-{RESAMPLE}' if stream else ''}.parquet"

    def _sample(self, name: str, stream: int, bar: ProgressBar) -> None:
        """Rollouts of a policy, and the scores of those that are compared, each written as soon as it is there."""
        path, settings, model = self._sample_file(name, stream), self.settings, None
        if not path.exists():
            # a policy's seed hangs on its name, not on its place in the list: pairs may be added later
            model = self.load(self.policies[name])
            if bent := inherited(model):
                raise ValueError(
                    f"{self.policies[name]}/generation_config.json sets {bent}: responses would come from another "
                    "distribution than their log-probs describe. Take these out of the file for the measurement."
                )
            if settings.gradients and any(name == f"{pair.origin:06d}" for pair in self.pairs):
                require_gradients_fit(model, settings.parameters, settings.gradients, settings.max_new_tokens)
            with self.computing.products(model.device):
                groups = sample_rollouts(
                    model,
                    self.processor,
                    self.rows,
                    settings.rollouts,
                    self.verifier,
                    seed=MEASURED.seed(settings.seed, stream, name),
                    max_new_tokens=settings.max_new_tokens,
                    source_step=int(name) if name.isdecimal() else -1,
                    score=False,
                    batch=self.rollout_batch,
                    chat_template_kwargs=self._as_trained["chat_template_kwargs"],
                )
            self._write(path, groups)
        groups = self._groups(name, stream)
        # the others only tell right from wrong
        if not all(trajectory.logps for group in groups for trajectory in group[: settings.scored]):
            model = self.load(self.policies[name]) if model is None else model
            logps = iter(self._score(model.eval(), groups))
            scored = [[replace(t, logps=tuple(next(logps))) for t in group[: settings.scored]] for group in groups]
            rest = [group[settings.scored :] for group in groups]
            self._write(path, [first + others for first, others in zip(scored, rest, strict=True)])
        if model is not None:
            del model
            gc.collect()
        bar.advance(1, sampled=name)

    def _score(self, model: PreTrainedModel, groups: Sequence[Sequence[Trajectory]]) -> list[list[float]]:
        """Log-probs of the scored rollouts of each prompt under a policy, in nats."""
        scored = [trajectory.token_ids for group in groups for trajectory in group[: self.settings.scored]]
        rows = [row for row in self.rows for _ in range(self.settings.scored)]
        with self.computing.products(model.device):
            return completion_logps(model, self.processor, rows, scored, self.score_batch, **self._as_trained)

    @staticmethod
    def _write(path: Path, groups: Sequence[Sequence[Trajectory]]) -> None:
        write_table(path, [as_row(trajectory) for group in groups for trajectory in group])

    def _groups(self, name: str, stream: int = 0) -> list[list[Trajectory]]:
        flat = [Trajectory(**row) for row in read_table(self._sample_file(name, stream))]
        k = self.settings.rollouts
        return [flat[start : start + k] for start in range(0, len(flat), k)]

    def _failed(self, name: str) -> np.ndarray:
        return np.array([not any(t.correct for t in group) for group in self._groups(name)], dtype=float)

    def _require_failures(self, name: str) -> None:
        if not self._failed(name).sum():
            raise ValueError(
                f"The policy {name} fails none of the {len(self.rows)} prompts in {self.settings.rollouts} rollouts, "
                "so Q is undefined there (a fraction of nothing). Take harder prompts, or fewer rollouts."
            )

    # Pairs

    def _compare(self, pairs: Sequence[Pair], bar: ProgressBar) -> None:
        """Compare one policy with its sources; two policies are in memory, the policy and one source."""
        origin = f"{pairs[0].origin:06d}"
        missing = [pair for pair in pairs if not (self.folder / "pairs" / pair.file).exists()]
        bar.advance(len(pairs) - len(missing))
        if not missing:
            return
        model, mine = self.load(self.policies[origin]).eval(), self._groups(origin)
        grams = self._own_grams(model, origin, mine)
        failed = self._failed(origin)
        for pair in missing:
            resample = pair.source == RESAMPLE
            groups = self._groups(origin if resample else pair.source, stream=int(resample))
            source = model if resample else self.load(self.policies[pair.source]).eval()
            correct = np.array([[t.correct for t in group] for group in groups])
            columns = {
                "failed": failed,
                "shown": failed * shown(correct, self.settings.rollouts),
                "shown_share": failed * shown(correct, 1),
            }
            log_weights = self._log_ratios(model, groups)
            own_log_weights = [-values for values in self._log_ratios(source, mine)]
            columns |= self._ratio_columns(log_weights, "source") | self._ratio_columns(own_log_weights, "policy")
            columns |= self._gradients(model, groups, grams, own_log_weights)
            table = pd.DataFrame({"uid": [row["uid"] for row in self.rows], **columns})
            write_table(self.folder / "pairs" / pair.file, table.to_dict("records"))
            bar.advance(1, pair=f"{pair.origin} and {pair.source}")
            del source
            gc.collect()  # a shared vision tower is a reference cycle: it would stay beside the next source
        del model
        gc.collect()

    def _log_ratios(self, model: PreTrainedModel, groups: Sequence[Sequence[Trajectory]]) -> list[np.ndarray]:
        """ln(model) − ln(sampler) of the scored tokens, a list over trajectories."""
        scored = [trajectory for group in groups for trajectory in group[: self.settings.scored]]
        return [np.subtract(ours, t.logps) for ours, t in zip(self._score(model, groups), scored, strict=True)]

    def _ratio_columns(self, log_weights: Sequence[np.ndarray], side: Side) -> dict[str, np.ndarray]:
        """Sums over the scored rollouts of each prompt, under the names that `PairSums` has for that side."""
        sums = ratio_sums(log_weights, side)
        by_prompt = (values.reshape(len(self.rows), -1).sum(axis=1) for values in sums)
        return dict(zip(RATIO_COLUMNS[side], by_prompt, strict=True))

    def _gradients(
        self,
        model: PreTrainedModel,
        groups: Sequence[Sequence[Trajectory]],
        grams: Sequence[np.ndarray],
        own_log_weights: Sequence[np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Measured variances, from the first rollout of the first prompts."""
        count = self.settings.gradients
        out = {name: np.zeros(len(groups)) for name in ("gradients", "gradient_own", *map(str, MEASURED_COSTS))}
        if count:
            chosen = [group[0] for group in groups[:count]]
            with self.computing.products(model.device):
                found = source_gradients(
                    model,
                    self.processor,
                    self.rows[:count],
                    [trajectory.token_ids for trajectory in chosen],
                    [trajectory.logps for trajectory in chosen],
                    self.settings.parameters,
                    **self._as_trained,
                )
            terms = both_sided(found, grams, own_log_weights[:: self.settings.scored][:count])
            out["gradients"][:count] = 1.0
            out["gradient_own"][:count] = terms["own"]
            out["gradient_current"][:count] = squared_deviations(found.plain)
            out["gradient_exact"][:count] = terms["exact"]
            out["gradient_sequence"][:count] = terms["sequence"]
        return out

    def _own_grams(self, model: PreTrainedModel, origin: str, mine: Sequence[Sequence[Trajectory]]) -> list[np.ndarray]:
        """Gram matrices of the policy's own gradients, the first rollout of the first prompts."""
        path, count = self.folder / "own" / f"{origin}.parquet", self.settings.gradients
        if not count:
            return []
        if not path.exists():
            tokens = [group[0].token_ids for group in mine[:count]]
            with self.computing.products(model.device):
                about = model, self.processor, self.rows[:count], tokens, self.settings.parameters
                grams = own_gram(*about, **self._as_trained)
            write_table(path, [{"gram": gram.flatten().tolist()} for gram in grams])
        flat = [np.array(row["gram"]) for row in read_table(path)]
        return [values.reshape(math.isqrt(len(values)), -1) for values in flat]

    # Summary

    def summarise(self) -> dict[str, Any]:
        """Write `table.parquet` and `signal.json` from the pairs on disk; return the content of the latter."""
        summary = summarise(read_pairs(self.folder, self.pairs), self.settings)
        summary["computing"] = asdict(self.computing)
        write_table(self.folder / "table.parquet", summary.pop("table"))
        write_json(self.folder / "signal.json", summary)
        return summary
