"""Slot replacement on TRL, and sampling outside of it.

Internals of TRL, transformers and datasets that the package overrides, replaces or reads, by the module that does so.
What is taken for granted of each is pinned in tests/trainer/test_trl_contract.py (sharding in test_fsdp.py); a new
release of one of them is tried against those first.

- `trainer` overrides `GRPOTrainer._generate_and_score_completions`, `_generate_single_turn`, `_calculate_rewards`,
  `_compute_loss` and `_get_per_token_logps_and_entropies`, appends to `_metrics`, and sets the model card's `_paper`.
- `inputs` calls `GRPOTrainer._tokenize_prompts` on a stand-in for a trainer, `prepare_multimodal_messages` and `pad`.
- `vllm` replaces `vllm_generation.LLM` and `vllm_generation.VLLMClient` while a trainer is made, sets
  `_last_loaded_step`, and calls `prepare_fsdp` and the Trainer's `_load_from_checkpoint`.
- `fsdp` sets the `mixed_precision_policy` of accelerate's plugin.
- `dataset` reads `Dataset._indices` and `Dataset._fingerprint`.
- `control.agreement` wraps `_get_train_sampler`, whose `RepeatSampler` has `num_samples` and `batch_size`;
  `control.fingerprint` reads `config._name_or_path`.
- `stages.factory` sets `TrainingArguments._n_gpu`; `world.policies` sets `_keys_to_ignore_on_save`.
- `world.speed.heads` wraps the forward pass that `add_fused_lm_head` of TRL makes, and registers an attention that
  calls `sdpa_attention_forward` of transformers (pinned in tests/world/test_heads.py).
"""
