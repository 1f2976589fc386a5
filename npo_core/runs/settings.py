"""All settings of a run, and those of a measurement, each declared once: type, default, meaning, bounds, group, source.

Every choice that the paper leaves open is a field here; `docs/implementation.md` lists those of a run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..declaration import COUNT, POSITIVE, SHARE, WHOLE, Bounds, check_declared, declarations, declared_field
from ..trainer import settings as declared
from ..trainer.settings import GuideBehaviour, Placement, RatioMode
from .validation import SUITES

Method = Literal["grpo", "npo", "autonpo", "luffy", "exgrpo", "rlep"]

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Qwen3 block."""


_run = partial(declared_field, "Run")
_world = partial(declared_field, "World")
_fact = partial(_world, makes_base=True)
_policy = partial(declared_field, "Policy")
_tiny = partial(_policy, makes_base=True)
_pretrained = partial(declared_field, "Pretrained policies")
_data = partial(declared_field, "Data of one's own")
_teacher = partial(declared_field, "Teacher")
_training = partial(declared_field, "Training")
_generation = partial(declared_field, "Generation")
_baseline = partial(declared_field, "Baselines")
_manual = partial(declared_field, "Manual interventions")
_auto = partial(declared_field, "Trigger and choice")
_log = partial(declared_field, "Checkpoints and logs")
_evaluation = partial(declared_field, "Evaluation")
_where = partial(declared_field, "Where it runs")
_measurement = partial(declared_field, "Measurement")
_guidance = partial(declared_field, declared.GROUP)


@dataclass(frozen=True)
class Settings:
    """Fields of a run's configuration; `declaration.Setting` says what is declared of each."""

    method: Method = _run("autonpo", "Training method.", "paper", acts="plan")
    preset: str = _run("cpu", "Name of the preset that the settings started from.")
    threads: int = _run(1, "CPU threads of the run; a run is reproducible bit for bit at a fixed number.", bounds=COUNT)
    seed: int = _run(0, "Seed of sampling during training; the data order has its own seed.", bounds=WHOLE)

    # World
    suites: tuple[str, ...] = _world(SUITES, "Task families, one per benchmark suite.")
    world_seed: int = _fact(0, "Seed that draws which facts are easy, middling and hard.", bounds=WHOLE)
    train_problems: int = _world(12800, "Distinct training prompts.", bounds=COUNT)
    data_seed: int = _world(0, "Seed of the training prompts and of their order.", bounds=WHOLE)
    box_ends: bool = _world(True, "A response that goes on behind its box is wrong.", later=True, before=False)
    easy_share: float = _fact(0.38, "Share of facts with error probability `easy_error`.", bounds=SHARE)
    middling_share: float = _fact(
        0.4, "Share of facts with error probability `middling_error`; the rest is hard.", bounds=SHARE
    )
    easy_error: float = _fact(0.02, "Probability that the corpus writes an easy fact wrongly.", bounds=SHARE)
    middling_error: float = _fact(0.5, "Probability that the corpus writes a middling fact wrongly.", bounds=SHARE)
    hard_error: float = _fact(0.975, "Probability that the corpus writes a hard fact wrongly.", bounds=SHARE)
    second_form_share: float = _fact(
        0.0, "Share of corpus responses in the second form: glyphs named first.", bounds=SHARE
    )
    reading_share: float = _fact(
        0.3, "Share of corpus responses that name the glyphs of the picture instead.", bounds=SHARE
    )

    # Policy
    policy: str = _policy("tiny", '"tiny", "smollm2" (SmolLM2-135M), else a Hugging Face folder or a hub name.')
    policy_seed: int = _tiny(0, "Seed of the tiny policy's initial weights and of its corpus.", bounds=WHOLE)
    hidden: int = _tiny(64, "Width of the tiny language model.", bounds=COUNT)
    layers: int = _tiny(3, "Layers of the tiny language model.", bounds=COUNT)
    heads: int = _tiny(2, "Attention heads of the tiny language model.", bounds=COUNT)
    vision_hidden: int = _tiny(64, "Width of the tiny vision tower.", bounds=COUNT)
    vision_depth: int = _tiny(2, "Layers of the tiny vision tower.", bounds=COUNT)
    freeze_vision: bool = _policy(True, "Train the language model only; the vision tower keeps its weights.")
    warmstart_steps: int = _tiny(
        1600, "Supervised steps on the imperfect corpus that make the base policy.", bounds=COUNT
    )
    warmstart_batch: int = _tiny(64, "Responses in a warm-start step.", bounds=COUNT)
    warmstart_learning_rate: float = _tiny(2.0e-3, "Peak learning rate of the warm start.", bounds=POSITIVE)

    # Pretrained policies
    warmstart_pass_rate: float = _pretrained(
        0.0,
        'Policy "smollm2": mean probability of a right response at which its supervised start ends; 0 for no start.',
        bounds=Bounds(0, 1, high_open=True),
    )
    dtype: Literal["float32", "bfloat16"] = _pretrained("float32", "Type of the policy's weights in memory.")
    mixed_precision: Literal["no", "bf16"] = _pretrained("no", "Precision of matrix products in training.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _pretrained("sdpa", "Attention of transformers.")
    gradient_checkpointing: bool = _pretrained(False, "Compute activations again in the backward pass, to save memory.")
    lora_rank: int = _pretrained(
        0, "Rank of LoRA adapters on the language model; 0 trains the weights themselves.", bounds=WHOLE
    )
    lora_alpha: int = _pretrained(32, "α of LoRA: the adapter's output is scaled by α / rank.", bounds=COUNT)
    lora_dropout: float = _pretrained(0.0, "Dropout in front of the adapters.", bounds=SHARE)
    lora_modules: tuple[str, ...] = _pretrained(
        LORA_MODULES, "Linear layers of the language model that get an adapter."
    )
    min_pixels: int = _pretrained(
        0, "Smaller pictures are enlarged to this many pixels; 0: as the processor has it.", bounds=WHOLE
    )
    max_pixels: int = _pretrained(
        0, "Larger pictures are shrunk to this many pixels; 0: as the processor has it.", bounds=WHOLE
    )

    # Data of one's own; without `data` the small world is used
    data: str = _data(
        "", 'Training prompts: a parquet or JSON-lines file, a folder, a hub name, "letters", or "reasoning_gym:TASK".'
    )
    data_split: str = _data("train", "Split of `data` that is trained on.")
    test_data: str = _data("", "Test prompts, as `data`; empty holds out `eval_problems` prompts of `data`.")
    test_split: str = _data("test", "Split of `test_data`; a file has one.")
    columns: tuple[str, ...] = _data((), 'Columns of `data` as "ours=theirs", such as "prompt=question".')
    instruction: str = _data("", "Text put behind every question.")
    image_root: str = _data("", "Folder of pictures that are named by relative paths.")
    max_prompt_length: int = _data(0, "Longest prompt in tokens, picture included; 0: no limit.", "paper", bounds=WHOLE)
    skip_refused: bool = _data(False, "Leave out rows that break the rules, in place of refusing the data.")
    score_threshold: float = _data(
        1.0,
        "Score from which an answer to a task of reasoning-gym is right.",
        bounds=Bounds(0, 1, low_open=True),
        later=True,
    )

    # External teacher: given, or for the tiny policy one of another seed, trained on a clean corpus in another form
    teacher: str = _teacher("", "External teacher: empty for the tiny policy's own, else a folder or a hub name.")
    teacher_seed: int = _teacher(1, "Seed of the external teacher's initial weights and of its corpus.", bounds=WHOLE)
    teacher_form_share: float = _teacher(1.0, "Share of the teacher's corpus in the second form.", bounds=SHARE)

    # Training (GRPO)
    compute_steps: int = _training(
        400, "Optimiser steps that the run may spend, rolled-back ones included.", bounds=COUNT, acts="plan"
    )
    prompts_per_step: int = _training(32, "Prompts in a step (paper: 256).", "paper", bounds=COUNT)
    num_generations: int = _training(8, "Rollouts in a group, n.", "paper", bounds=Bounds(2))
    micro_batch: int = _training(
        256, "Rollouts in a forward pass; a step accumulates as many as it needs.", bounds=COUNT
    )
    max_completion_length: int = _training(
        16, "Longest response in tokens, end of sequence included.", "paper", bounds=COUNT
    )
    learning_rate: float = _training(
        1.0e-3, "AdamW learning rate, constant (paper: 1e-6 for 8B).", "paper", bounds=POSITIVE
    )
    weight_decay: float = _training(0.01, "AdamW weight decay.", "paper", bounds=WHOLE)
    max_grad_norm: float = _training(1.0, "Gradient norm clip.", "paper", bounds=WHOLE)
    epsilon: float = _training(0.2, "Lower clip of the importance ratio.", "paper", bounds=WHOLE)
    epsilon_high: float = _training(0.28, "Upper clip of the importance ratio.", "paper", bounds=WHOLE)
    temperature: float = _training(1.0, "Sampling temperature of rollouts.", "paper", bounds=POSITIVE)
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = _training(
        "grpo", "TRL's loss; grpo is the mean over slots of the per-sequence token mean.", "paper"
    )

    # Generation by vLLM, and off-line passes
    vllm: Literal["off", "colocate", "server"] = _generation("off", "Who samples: transformers, or vLLM as in TRL.")
    vllm_memory: float = _generation(0.3, "Share of a GPU's memory for vLLM in mode colocate.", bounds=SHARE)
    vllm_tensor_parallel: int = _generation(1, "GPUs of a vLLM engine in mode colocate; only 1.", bounds=COUNT)
    vllm_host: str = _generation("0.0.0.0", "Host of TRL's vLLM server in mode server.", names_run=False)
    vllm_port: int = _generation(8000, "Port of TRL's vLLM server in mode server.", names_run=False, bounds=COUNT)
    rollout_batch: int = _generation(
        512,
        "Responses that transformers samples at a time off line, at most: fewer where memory asks for it.",
        bounds=COUNT,
    )
    score_batch: int = _generation(
        512, "Responses in a scoring pass off line, at most: fewer where memory asks for it.", bounds=COUNT
    )

    # Guidance
    tau_gate: float = declared.TAU_GATE.field()
    ratio_mode: RatioMode = declared.RATIO_MODE.field()
    ratio_truncation: float = declared.RATIO_TRUNCATION.field()
    ratio_gamma: float = declared.RATIO_GAMMA.field()
    guide_behaviour: GuideBehaviour = declared.GUIDE_BEHAVIOUR.field()
    guide_prefix: float = declared.GUIDE_PREFIX.field()
    mask_unsampled: bool = declared.MASK_UNSAMPLED.field()
    placement: Placement = declared.PLACEMENT.field()
    guides_per_group: int = declared.GUIDES_PER_GROUP.field()
    advantage_scale: Literal["group", "none"] = _guidance(
        "group", "Advantages divided by the group's std, or only centred (LUFFY).", "paper"
    )
    entropy_bonus: float = _guidance(0.0, "Weight of the mean token entropy in the objective.", "paper", bounds=WHOLE)
    guide_from: Literal["future", "own", "none"] = _guidance(
        "future",
        "Guides of a replay: of the later policy, of the policy rolled back to, or none (controls).",
        acts="guidance",
    )
    random_interventions: int = _guidance(
        0, "Roll-backs at random steps and distances in place of those planned (control).", bounds=WHOLE, acts="plan"
    )
    cache_rollouts: int = _guidance(
        8, "Off-line rollouts per prompt for the guidance cache, at most.", bounds=COUNT, acts="guidance"
    )
    cache_prompts: Literal["gated", "all"] = _guidance(
        "all",
        "Method npo: prompts of a replayed window that get a guide, those gated when it first ran, or all.",
        acts="guidance",
    )
    cache_stop: bool = _guidance(
        False,
        "Methods npo and autonpo, with cache_rule first: stop sampling a prompt at its first usable rollout.",
        acts="guidance",
    )
    cache_rule: Literal["first", "shortest", "closest"] = _guidance(
        "first", "Methods npo and autonpo: which correct rollout of a prompt is kept as its guide.", acts="guidance"
    )

    # Baselines: RLEP's earlier run, ExGRPO's replay of own successes
    rlep_source_steps: int = _baseline(
        200, "Steps of the converged run whose last policy guides; they are charged.", bounds=COUNT, acts="plan"
    )
    replay_share: float = _baseline(
        0.5, "Share of the prompts of a step that come from own successes.", "paper", bounds=SHARE, acts="plan"
    )
    replay_start: float = _baseline(
        0.35, "Replay starts when a step's pass rate exceeds this.", "paper", bounds=SHARE, acts="plan"
    )
    replay_keep: int = _baseline(
        8, "Newest correct rollouts of a prompt that are kept for replay.", bounds=COUNT, acts="plan"
    )

    # Manual interventions (method npo); 0 leaves a stage out
    scout_steps: int = _manual(
        40,
        "Early stage: length of the scout run, whose last policy is the guide; 0 for none.",
        bounds=WHOLE,
        acts="plan",
    )
    early_window: int = _manual(
        40, "Early stage: guided steps after the restart from the base policy.", bounds=WHOLE, acts="plan"
    )
    late_step: int = _manual(
        260,
        "Late stage: policy step past the plateau, whose policy is the guide; 0 for none.",
        bounds=WHOLE,
        acts="plan",
    )
    late_start: int = _manual(
        180, "Late stage: policy step that is rolled back to, the start of the plateau.", bounds=WHOLE, acts="plan"
    )

    repeat_every: int = _manual(
        0, "Steps between repeated interventions, in place of both stages; 0 for none.", bounds=WHOLE, acts="plan"
    )
    repeat_back: int = _manual(
        20, "Repeated: steps rolled back each time; 0 guides the prompts ahead instead.", bounds=WHOLE, acts="plan"
    )

    # Trigger and choice (AutoNPO)
    roll_back: bool = _auto(True, "Interventions roll back; false guides the prompts ahead instead.")
    ahead_window: int = _auto(40, "Guided steps of an intervention without roll-back.", bounds=COUNT)
    max_distance: int = _auto(0, "Longest roll-back that is a candidate; 0 for no limit.", bounds=WHOLE)
    trigger_ema: float = _auto(
        0.9, "Weight of the past in the averages of reward and entropy.", bounds=Bounds(0, 1, high_open=True)
    )
    trigger_window: int = _auto(20, "Steps over which the averages must be flat and falling.", bounds=COUNT)
    trigger_reward_tolerance: float = _auto(0.01, "Largest rise of the reward average over the window.", bounds=WHOLE)
    trigger_entropy_drop: float = _auto(
        0.1, "Smallest relative fall of the entropy average over the window.", bounds=Bounds(0, 1, low_open=True)
    )
    trigger_warmup: int = _auto(40, "Steps before the first warning.", bounds=WHOLE)
    trigger_cooldown: int = _auto(40, "Steps between warnings.", bounds=WHOLE)
    alarm_rise: float = _auto(
        0.5,
        "Alarm: relative rise of entropy or length over the window that is told when reward does not rise; 0 for none.",
        bounds=WHOLE,
        names_run=False,
    )
    alarm_clipped: float = _auto(
        0.5,
        "Alarm: share of responses cut off at the longest length above which it is told; 0 for none.",
        bounds=SHARE,
        names_run=False,
    )
    max_interventions: int = _auto(3, "Roll-backs in a run.", bounds=WHOLE)
    pool_cutoff: float = _auto(
        0.125, "A prompt enters the mistake pool at a group pass rate of at most this.", bounds=SHARE
    )
    pool_capacity: int = _auto(4096, "Prompts in the mistake pool.", bounds=COUNT)
    pool_expiry: int = _auto(400, "Steps after which a mistake is forgotten.", bounds=COUNT)
    probe_prompts: int = _auto(64, "Mistakes that a confirmation probe samples.", bounds=COUNT)
    probe_rollouts: int = _auto(8, "Rollouts per prompt in a probe.", bounds=COUNT)
    confirm_quality: float = _auto(0.05, "Probe pass rate below which a warning is dismissed.", bounds=SHARE)
    quality_floor: float = _auto(0.0, "Smallest quality Q̂ of an eligible distance; the paper has none.", bounds=SHARE)
    variance_proxy: Literal["kl", "second_moment", "sequence"] = _auto("kl", "Estimator V̂ of the variance cost.")
    variance_c: float = _auto(
        3.3, "c of V̂ = exp(c·KL per token), fitted to mode current; 17 for exact.", bounds=POSITIVE
    )

    # Checkpoints and logs
    checkpoint_every: int = _log(
        10, "Steps between checkpoints; the grid of roll-back distances.", "paper", bounds=COUNT
    )
    checkpoint_keep: int = _log(
        20, "Newest checkpoints of a branch that stay resumable; 0 keeps all.", bounds=WHOLE, acts="plan"
    )
    rollout_every: int = _log(20, "Steps between rollout tables on disk; 0 for none.", bounds=WHOLE)
    record_mib: float = _log(
        64.0,
        "MiB on disk for guided groups, refused guides and their pictures; 0 for none.",
        names_run=False,
        bounds=WHOLE,
    )

    # Evaluation
    eval_problems: int = _evaluation(256, "Test prompts, the suites in turn.", bounds=COUNT)
    eval_rollouts: int = _evaluation(8, "Rollouts per test prompt.", bounds=COUNT)
    eval_temperature: float = _evaluation(0.7, "Sampling temperature of evaluation.", "paper", bounds=POSITIVE)
    eval_top_p: float = _evaluation(0.8, "Nucleus of evaluation sampling.", "paper", bounds=SHARE)
    eval_top_k: int = _evaluation(20, "Top-k of evaluation sampling.", "paper", bounds=WHOLE)

    # Where it runs
    launcher: str = _where("", "Processes: empty for one, else an accelerate configuration; each samples its own.")
    gpu_memory: float = _where(0.0, "GiB of a GPU, for the plan; 0 asks the device.", names_run=False, bounds=WHOLE)
    report_to: tuple[str, ...] = _where((), "Trackers of transformers: trackio, wandb, tensorboard.", names_run=False)


GRADIENTS = 64
"""Prompts with a measured gradient in each pair of a signal measurement, unless a number is asked for."""

WHERE_THEY_FIT = -1
"""As a number of gradients: `GRADIENTS` where they fit into memory, else none, which is said."""


@dataclass(frozen=True)
class SignalSettings:
    """How Q and V are measured; every choice is ours, the paper's are not public.

    Q counts a prompt as failed when all of the policy's rollouts are wrong, and as shown when one of the source's is
    correct. `c` = 2 is that of log-normal weights per token; a fit to the measured variance is reported beside it,
    where there is one.
    """

    prompts: int = _measurement(256, "Prompts, the first of the data set.", bounds=Bounds(2))
    rollouts: int = _measurement(8, "Rollouts per prompt and policy.", bounds=COUNT)
    scored: int = _measurement(
        2, "Rollouts per prompt that are scored in each pair, for KL and second moments.", bounds=COUNT
    )
    gradients: int = _measurement(
        WHERE_THEY_FIT,
        f"Prompts with a measured gradient in each pair; 0 leaves the measured variance out, {WHERE_THEY_FIT} takes "
        f"{GRADIENTS} (no more than there are prompts) where they fit into memory, and else none.",
        bounds=Bounds(WHERE_THEY_FIT),
    )
    parameters: str = _measurement(
        "", "Regular expression of the parameters of the gradients; empty: all trainable ones."
    )
    max_new_tokens: int = _measurement(512, "Longest response in tokens.", bounds=COUNT)
    c: float = _measurement(2.0, "Constant of the proxy e^(c·KL).", bounds=WHOLE, names_run=False)
    resamples: int = _measurement(1000, "Bootstrap resamples over prompts.", bounds=COUNT, names_run=False)
    seed: int = _measurement(0, "Seed of sampling and resampling.", bounds=WHOLE)
    temperature: float = _measurement(1.0, "Sampling temperature; must be 1.")
    top_p: float = _measurement(1.0, "Nucleus; must be 1.")
    top_k: int = _measurement(0, "Number of likeliest tokens; must be 0.")

    def __post_init__(self):
        check_declared(self)
        if self.temperature != 1 or self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                f"Truncated or tempered sampling (temperature {self.temperature}, top_p {self.top_p}, top_k "
                f"{self.top_k}) makes every importance ratio biased: tokens would come from another distribution than "
                "the log-probs describe. Sample with temperature=1, top_p=1, top_k=0."
            )
        if self.scored > self.rollouts:
            raise ValueError(f"scored is {self.scored}; at most rollouts = {self.rollouts} can be scored.")
        if self.gradients == 1 or self.gradients > self.prompts:
            raise ValueError(f"gradients is {self.gradients}; it must be 0 or from 2 to prompts = {self.prompts}.")

    def of_rollouts(self) -> dict[str, Any]:
        """Settings that decide what is on disk; c and the number of resamples only enter the summary."""
        return {name: getattr(self, name) for name, setting in declarations(self).items() if setting.names_run}
