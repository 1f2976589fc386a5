"""Manual interventions: roll back at steps fixed before the run, and replay with the policy of that moment as guide.

The paper's two manual forms of NPO are one mechanism with different steps. *Early-stage bootstrapping*: a short scout
run from the base policy; its last policy is the guide; restart from the base policy with guidance over an early window.
*Late-stage plateau breakthrough*: train past the plateau, roll back to its start, replay with the later policy as the
guide. The steps are settings; the paper's are not public.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..runs.checkpoints import checkpoint_folder, require_complete
from ..runs.config import RunConfig
from ..streams import RANDOM_PLAN
from ..trainer.trainer import NPOTrainer
from .controller import Controller
from .watch import Segment, Watch


@dataclass(frozen=True)
class Intervention:
    """One scheduled roll-back.

    Attributes:
        stage: "early", "late", "repeated" or "random".
        at: Policy step at which training stops; the policy there is the guide.
        back_to: Policy step that is rolled back to; 0 is the base policy, `at` itself no roll-back.
        guide_until: Policy step at which guidance ends.
    """

    stage: str
    at: int
    back_to: int
    guide_until: int


def planned_interventions(config: RunConfig) -> tuple[Intervention, ...]:
    """Interventions of a configuration in the order they happen; a stage whose first setting is 0 is left out.

    With `repeat_every` they come again and again, see `repeated_plan`; with `random_interventions` their steps are
    drawn from the run's seed, see `random_plan`.
    """
    if config.repeat_every:
        return repeated_plan(config)
    if config.random_interventions:
        return random_plan(config)
    plan = []
    if config.scout_steps:
        plan.append(Intervention("early", config.scout_steps, 0, config.early_window))
    if config.late_step:
        plan.append(Intervention("late", config.late_step, config.late_start, config.late_step))
    return tuple(plan)


def repeated_plan(config: RunConfig) -> tuple[Intervention, ...]:
    """Every `repeat_every` steps of the trajectory, back by `repeat_back` and guided up to there again (ours).

    Without roll-back (`repeat_back` 0) the policy's own guides are sampled for the prompts ahead, up to the next
    intervention: what a practitioner would try who has no way back. A replay that the budget would cut short is left
    out.
    """
    every, back = config.repeat_every, config.repeat_back
    plan = []
    for turn in range(1, config.compute_steps // every + 1):
        at = turn * every
        left = config.compute_steps - at - (turn - 1) * back
        if left < max(back, 1):
            break
        plan.append(Intervention("repeated", at, at - back, at if back else at + min(every, left)))
    return tuple(plan)


def random_plan(config: RunConfig) -> tuple[Intervention, ...]:
    """Roll-backs at random steps and distances on the grid of checkpoints, from the seed alone (a control, ours).

    Each step is uniform over those at which a replay still fits into the budget, each distance uniform over those that
    the budget allows. Fewer than asked for when the budget is spent earlier. A roll-back may fall into the replay of
    the one before, whose guidance ends there.
    """
    rng = RANDOM_PLAN.generator(config.seed)
    every = config.checkpoint_every
    place = spent = 0
    plan = []
    for _ in range(config.random_interventions):
        left = config.compute_steps - spent
        stops = [step for step in range(every, config.compute_steps + 1, every) if place < step <= place + left - every]
        if not stops:
            break
        at = int(rng.choice(stops))
        spent += at - place
        longest = min(at, config.compute_steps - spent)
        place = at - int(rng.choice(range(every, longest + 1, every)))
        plan.append(Intervention("random", at, place, at))
    return tuple(plan)


class ScheduledNPO(Controller):
    """Controller of a run with manual interventions, at the steps that the configuration names.

    The cache covers the prompts of the window that is replayed; the gate alone decides which groups are guided (paper:
    the pool of mistakes belongs to AutoNPO). Arguments are those of `Controller`.
    """

    def _next(self, segments: Sequence[Segment]) -> Intervention | None:
        """The intervention that the last segment leads to.

        A dismissed one is not tried again, nor those of steps that training is then past already: after a roll-back
        that was planned, and did not happen, a random plan may ask for an earlier step.
        """
        plan, place = planned_interventions(self.config), -1
        for event in self.run_folder.effective_events():
            if event["event"] == "segment":
                place += 1
            elif event["event"] == "dismissed":
                place += 1
                while place < len(plan) and plan[place].at <= event["policy_step"]:
                    place += 1
        return plan[place] if place < len(plan) else None

    def _complaints(self, trainer: NPOTrainer) -> list[str]:
        plan = planned_interventions(self.config)
        found = self._order_complaints(trainer, max((each.guide_until for each in plan), default=0))
        stops, every = {each.at for each in plan}, trainer.args.save_steps
        missed = [each.back_to for each in plan if each.back_to % every and each.back_to not in stops]
        found += [f"save_steps is {every}; step {step}, which is rolled back to, is no multiple" for step in missed]
        return found

    def _stop_at(self, segments: Sequence[Segment]) -> int | None:
        intervention = self._next(segments)
        return None if intervention is None else intervention.at

    def _decide(self, trainer: NPOTrainer, watch: Watch, step: int, segments: Sequence[Segment]) -> Segment | None:
        intervention = self._next(segments)
        assert intervention is not None  # training stops for one
        origin = None
        if intervention.back_to == step:
            origin = checkpoint_folder(self._branch(segments[-1]), step)
        elif intervention.back_to:
            origin = self._checkpoints(segments).get(intervention.back_to)
            if origin is None:
                # names what is wrong with it: missing, half written or slimmed
                require_complete(checkpoint_folder(self._branch(segments[-1]), intervention.back_to))
        prompts = self._prompts_of(trainer, intervention.back_to, intervention.guide_until)
        uids = self._gated(prompts, segments, intervention.back_to)
        clocks = {"policy_step": step, "compute_step": watch.compute_step}
        self.run_folder.event(
            "planned", **clocks, stage=intervention.stage, to=intervention.back_to, guide_until=intervention.guide_until
        )
        return self._replay(trainer, watch, step, origin, uids, intervention.guide_until)
