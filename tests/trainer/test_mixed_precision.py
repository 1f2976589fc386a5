"""Products in 16 bits: sampling with weights that are cast once trains as TRL does, which casts them for each token."""

import torch
from trl import GRPOTrainer
from worlds import SpyTrainer, trainer_of, world


def _reward(completion_ids, **_):
    return [float(ids[0] % 3) for ids in completion_ids]


def test_the_weights_are_those_of_grpo_bit_for_bit(tmp_path):
    """A weight that is remembered from sampling, where none has a gradient, would not be trained."""
    ends, dtypes = [], []
    for kind in (GRPOTrainer, SpyTrainer):
        trainer = trainer_of(world("text"), tmp_path, kind, steps=2, reward=_reward, bf16=True)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        layer = next(part for part in trainer.model.modules() if isinstance(part, torch.nn.Linear))
        layer.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
        trainer.train()
        ends.append(trainer.model.state_dict())
        assert all(not torch.equal(before[name], value) for name, value in ends[-1].items() if "proj" in name)
    assert set(dtypes) == {torch.bfloat16}
    assert not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
