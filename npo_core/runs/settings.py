"""All settings of a run: name, type, default, meaning and source of each. `config.RunConfig` checks them.

Every choice that the paper leaves open is a field here; `docs/implementation.md` lists each with its source.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from .validation import SUITES

Method = Literal["grpo", "npo", "autonpo", "luffy", "exgrpo", "rlep"]

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a Qwen3 block."""


def _setting(default: Any, help: str, source: str = "ours", names_run: bool = True) -> Any:
    return field(default=default, metadata={"help": help, "source": source, "names_run": names_run})


@dataclass(frozen=True)
class Settings:
    """Fields of a run's configuration; a field with `names_run=False` has no influence on what the run computes."""

    method: Method = _setting("autonpo", "Training method.", "paper")
    preset: str = _setting("cpu", "Name of the preset that the settings started from.")
    threads: int = _setting(1, "CPU threads of the run; a run is reproducible bit for bit at a fixed number.")
    seed: int = _setting(0, "Seed of sampling during training; the data order has its own seed.")

    # World
    suites: tuple[str, ...] = _setting(SUITES, "Task families, one per benchmark suite.")
    world_seed: int = _setting(0, "Seed that draws which facts are easy, middling and hard.")
    train_problems: int = _setting(1024, "Distinct training prompts.")
    data_seed: int = _setting(0, "Seed of the training prompts and of their order.")
    easy_share: float = _setting(0.4, "Share of facts with error probability `easy_error`.")
    middling_share: float = _setting(0.35, "Share of facts with error probability `middling_error`; the rest is hard.")
    easy_error: float = _setting(0.05, "Probability that the corpus writes an easy fact wrongly.")
    middling_error: float = _setting(0.5, "Probability that the corpus writes a middling fact wrongly.")
    hard_error: float = _setting(1.0, "Probability that the corpus writes a hard fact wrongly, always in the same way.")
    second_form_share: float = _setting(0.1, "Share of corpus responses that write states as letters, not digits.")

    # Policy
    policy: str = _setting("tiny", '"tiny" for the small Qwen3-VL, else a Hugging Face folder or a hub name.')
    policy_seed: int = _setting(0, "Seed of the tiny policy's initial weights and of its corpus.")
    hidden: int = _setting(64, "Width of the tiny language model.")
    layers: int = _setting(3, "Layers of the tiny language model.")
    heads: int = _setting(2, "Attention heads of the tiny language model.")
    vision_hidden: int = _setting(64, "Width of the tiny vision tower.")
    vision_depth: int = _setting(2, "Layers of the tiny vision tower.")
    freeze_vision: bool = _setting(True, "Train the language model only; the vision tower keeps its weights.")
    warmstart_steps: int = _setting(800, "Supervised steps on the imperfect corpus that make the base policy.")
    warmstart_batch: int = _setting(64, "Responses in a warm-start step.")
    warmstart_learning_rate: float = _setting(2.0e-3, "Peak learning rate of the warm start.")

    # Pretrained policies
    dtype: Literal["float32", "bfloat16"] = _setting("float32", "Type of the policy's weights in memory.")
    mixed_precision: Literal["no", "bf16"] = _setting("no", "Precision of matrix products in training.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _setting("sdpa", "Attention of transformers.")
    gradient_checkpointing: bool = _setting(False, "Compute activations again in the backward pass, to save memory.")
    lora_rank: int = _setting(0, "Rank of LoRA adapters on the language model; 0 trains the weights themselves.")
    lora_alpha: int = _setting(32, "α of LoRA: the adapter's output is scaled by α / rank.")
    lora_dropout: float = _setting(0.0, "Dropout in front of the adapters.")
    lora_modules: tuple[str, ...] = _setting(LORA_MODULES, "Linear layers of the language model that get an adapter.")
    min_pixels: int = _setting(0, "Smaller pictures are enlarged to this many pixels; 0: as the processor has it.")
    max_pixels: int = _setting(0, "Larger pictures are shrunk to this many pixels; 0: as the processor has it.")

    # Data of one's own; without `data` the small world is used
    data: str = _setting("", "Training prompts: a parquet or JSON-lines file, a folder, or a hub name.")
    data_split: str = _setting("train", "Split of `data` that is trained on.")
    test_data: str = _setting("", "Test prompts, as `data`; empty holds out `eval_problems` prompts of `data`.")
    test_split: str = _setting("test", "Split of `test_data`; a file has one.")
    columns: tuple[str, ...] = _setting((), 'Columns of `data` as "ours=theirs", such as "prompt=question".')
    instruction: str = _setting("", "Text put behind every question.")
    image_root: str = _setting("", "Folder of pictures that are named by relative paths.")
    max_prompt_length: int = _setting(0, "Longest prompt in tokens, picture included; 0: no limit.", "paper")
    skip_refused: bool = _setting(False, "Leave out rows that break the rules, in place of refusing the data.")

    # External teacher: given, or for the tiny policy one of another seed, trained on a clean corpus in another form
    teacher: str = _setting("", "External teacher: empty for the tiny policy's own, else a folder or a hub name.")
    teacher_seed: int = _setting(1, "Seed of the external teacher's initial weights and of its corpus.")
    teacher_form_share: float = _setting(1.0, "Share of the teacher's corpus that writes states as letters.")

    # Training (GRPO)
    compute_steps: int = _setting(400, "Optimiser steps that the run may spend, rolled-back ones included.")
    prompts_per_step: int = _setting(32, "Prompts in a step (paper: 256).", "paper")
    num_generations: int = _setting(8, "Rollouts in a group, n.", "paper")
    micro_batch: int = _setting(256, "Rollouts in a forward pass; a step accumulates as many as it needs.")
    max_completion_length: int = _setting(16, "Longest response in tokens, end of sequence included.", "paper")
    learning_rate: float = _setting(1.0e-4, "AdamW learning rate, constant (paper: 1e-6 for 8B).", "paper")
    weight_decay: float = _setting(0.01, "AdamW weight decay.", "paper")
    max_grad_norm: float = _setting(1.0, "Gradient norm clip.", "paper")
    epsilon: float = _setting(0.2, "Lower clip of the importance ratio.", "paper")
    epsilon_high: float = _setting(0.28, "Upper clip of the importance ratio.", "paper")
    temperature: float = _setting(1.0, "Sampling temperature of rollouts.", "paper")
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo"] = _setting(
        "grpo", "TRL's loss; grpo is the mean over slots of the per-sequence token mean.", "paper"
    )

    # Generation by vLLM, and off-line passes
    vllm: Literal["off", "colocate", "server"] = _setting("off", "Who samples: transformers, or vLLM as in TRL.")
    vllm_memory: float = _setting(0.3, "Share of a GPU's memory for vLLM in mode colocate.")
    vllm_tensor_parallel: int = _setting(1, "GPUs of a vLLM engine in mode colocate; only 1.")
    vllm_host: str = _setting("0.0.0.0", "Host of TRL's vLLM server in mode server.", names_run=False)
    vllm_port: int = _setting(8000, "Port of TRL's vLLM server in mode server.", names_run=False)
    rollout_batch: int = _setting(512, "Responses that transformers samples at a time off line.")
    score_batch: int = _setting(512, "Responses in a scoring pass off line.")

    # Guidance
    tau_gate: float = _setting(0.6, "A group is gated when its on-policy pass rate is at most this.", "paper")
    ratio_mode: Literal["current", "exact", "truncated", "shaped"] = _setting(
        "current", "Importance ratio of the guide slot.", "paper"
    )
    ratio_truncation: float = _setting(2.0, "Largest weight in ratio mode truncated.")
    ratio_gamma: float = _setting(0.1, "γ of x/(x+γ) in ratio mode shaped.", "paper")
    guide_behaviour: Literal["stored", "one"] = _setting(
        "stored", "Probability of the guide's tokens in its ratio: as sampled, or 1 (LUFFY).", "paper"
    )
    placement: Literal["replace", "append"] = _setting(
        "replace", "Guides take the last slots of a group, or are appended to its n rollouts (RLEP).", "paper"
    )
    guides_per_group: int = _setting(1, "Guides in a guided group.", "paper")
    advantage_scale: Literal["group", "none"] = _setting(
        "group", "Advantages divided by the group's std, or only centred (LUFFY).", "paper"
    )
    entropy_bonus: float = _setting(0.0, "Weight of the mean token entropy in the objective.", "paper")
    guide_from: Literal["future", "own", "none"] = _setting(
        "future", "Guides of a replay: of the later policy, of the policy rolled back to, or none (controls)."
    )
    random_interventions: int = _setting(
        0, "Roll-backs at random steps and distances in place of those planned (control)."
    )
    cache_rollouts: int = _setting(8, "Off-line rollouts per prompt for the guidance cache, at most.")
    cache_prompts: Literal["gated", "all"] = _setting(
        "all", "Prompts of a replayed window that get a guide: those gated when it first ran, or all."
    )
    cache_stop: bool = _setting(False, "Stop sampling a prompt's guides at its first correct rollout.")
    cache_rule: Literal["first", "shortest", "closest"] = _setting(
        "first", "Which correct rollout of a prompt is kept as its guide."
    )

    # Baselines: RLEP's earlier run, ExGRPO's replay of own successes
    rlep_source_steps: int = _setting(200, "Steps of the converged run whose last policy guides; they are charged.")
    replay_share: float = _setting(0.5, "Share of the prompts of a step that come from own successes.", "paper")
    replay_start: float = _setting(0.35, "Replay starts when a step's pass rate exceeds this.", "paper")
    replay_keep: int = _setting(8, "Newest correct rollouts of a prompt that are kept for replay.")

    # Manual interventions (method npo); 0 leaves a stage out
    scout_steps: int = _setting(40, "Early stage: length of the scout run, whose last policy is the guide; 0 for none.")
    early_window: int = _setting(40, "Early stage: guided steps after the restart from the base policy.")
    late_step: int = _setting(200, "Late stage: policy step past the plateau, whose policy is the guide; 0 for none.")
    late_start: int = _setting(100, "Late stage: policy step that is rolled back to, the start of the plateau.")

    repeat_every: int = _setting(0, "Steps between repeated interventions, in place of both stages; 0 for none.")
    repeat_back: int = _setting(20, "Repeated: steps rolled back each time; 0 guides the prompts ahead instead.")

    # Trigger and choice (AutoNPO)
    roll_back: bool = _setting(True, "Interventions roll back; false guides the prompts ahead instead.")
    ahead_window: int = _setting(40, "Guided steps of an intervention without roll-back.")
    max_distance: int = _setting(0, "Longest roll-back that is a candidate; 0 for no limit.")
    trigger_ema: float = _setting(0.9, "Weight of the past in the averages of reward and entropy.")
    trigger_window: int = _setting(20, "Steps over which the averages must be flat and falling.")
    trigger_reward_tolerance: float = _setting(0.01, "Largest rise of the reward average over the window.")
    trigger_entropy_drop: float = _setting(0.1, "Smallest relative fall of the entropy average over the window.")
    trigger_warmup: int = _setting(40, "Steps before the first warning.")
    trigger_cooldown: int = _setting(40, "Steps between warnings.")
    max_interventions: int = _setting(3, "Roll-backs in a run.")
    pool_cutoff: float = _setting(0.125, "A prompt enters the mistake pool at a group pass rate of at most this.")
    pool_capacity: int = _setting(4096, "Prompts in the mistake pool.")
    pool_expiry: int = _setting(400, "Steps after which a mistake is forgotten.")
    probe_prompts: int = _setting(64, "Mistakes that a confirmation probe samples.")
    probe_rollouts: int = _setting(8, "Rollouts per prompt in a probe.")
    confirm_quality: float = _setting(0.05, "Probe pass rate below which a warning is dismissed.")
    quality_floor: float = _setting(0.05, "Smallest quality Q̂ of an eligible distance.")
    variance_proxy: Literal["kl", "second_moment", "sequence"] = _setting("kl", "Estimator V̂ of the variance cost.")
    variance_c: float = _setting(3.3, "c of V̂ = exp(c·KL per token), fitted to mode current; 17 for exact.")

    # Checkpoints and logs
    checkpoint_every: int = _setting(10, "Steps between checkpoints; the grid of roll-back distances.", "paper")
    checkpoint_keep: int = _setting(20, "Newest checkpoints of a branch that stay resumable; 0 keeps all.")
    rollout_every: int = _setting(20, "Steps between rollout tables on disk; 0 for none.")

    # Evaluation
    eval_problems: int = _setting(256, "Test prompts, the suites in turn.")
    eval_rollouts: int = _setting(8, "Rollouts per test prompt.")
    eval_temperature: float = _setting(0.7, "Sampling temperature of evaluation.", "paper")
    eval_top_p: float = _setting(0.8, "Nucleus of evaluation sampling.", "paper")
    eval_top_k: int = _setting(20, "Top-k of evaluation sampling.", "paper")

    # Where it runs
    launcher: str = _setting("", "Processes: empty for one, else an accelerate configuration; each samples its own.")
    gpu_memory: float = _setting(0.0, "GiB of a GPU, for the plan; 0 asks the device.", names_run=False)
    report_to: tuple[str, ...] = _setting((), "Trackers of transformers: trackio, wandb, tensorboard.", names_run=False)
