"""For each setting a configuration in which it may change alone, and another valid value for it."""

from dataclasses import Field, replace

from npo_core.runs.config import RunConfig
from npo_core.runs.validation import SUITES

OTHER = {
    "preset": "other",
    "suites": SUITES[:2],
    "policy": "/elsewhere",
    "teacher": "/elsewhere",
    "dtype": "bfloat16",
    "mixed_precision": "bf16",
    "attention": "eager",
    "lora_modules": ("q_proj",),
    "data": "others.parquet",
    "data_split": "validation",
    "test_data": "others.parquet",
    "test_split": "validation",
    "columns": ("prompt=problem",),
    "instruction": "Think.",
    "image_root": "pictures",
    "vllm": "colocate",
    "vllm_host": "elsewhere",
    "launcher": "one_node",
    "report_to": ("wandb",),
    "loss_type": "dapo",
    "ratio_mode": "exact",
    "cache_rule": "shortest",
    "cache_prompts": "gated",
    "variance_proxy": "sequence",
    "micro_batch": 128,
    "guide_behaviour": "one",
    "placement": "append",
    "advantage_scale": "none",
    "guide_from": "own",
}
"""Another valid value of each setting for which 'a bit smaller or larger' is none."""

METHOD = {"guides_per_group": "rlep", "placement": "rlep", "random_interventions": "npo", "guide_from": "npo"}
"""Method of the settings that not every method may change."""


def another(setting: Field, value):
    """A valid value of a setting that differs from `value`."""
    if setting.name in OTHER:
        return OTHER[setting.name]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.9 if value else 0.1


def pair(setting: Field, method: str = "autonpo") -> tuple[RunConfig, RunConfig]:
    """Two valid configurations that differ in one setting."""
    real = setting.name == "warmstart_pass_rate"  # the supervised start of one model on one task
    config = RunConfig(
        method=METHOD.get(setting.name, method),
        micro_batch=8,  # divides whatever the others become
        checkpoint_keep=0 if setting.name == "random_interventions" else 20,
        # a tiny policy has no data of one's own, and vLLM needs a limit
        policy="smollm2" if real else "/somewhere",
        data="letters" if real else "some.parquet",
        vllm="server",
        max_prompt_length=64,
    )
    value = getattr(config, setting.name)
    changed = ("grpo" if value != "grpo" else "autonpo") if setting.name == "method" else another(setting, value)
    assert changed != value, setting.name
    return config, replace(config, **{setting.name: changed})
