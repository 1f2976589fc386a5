"""The explicit order in which the prompts of a data set come, so that a replay sees them again."""

import numpy as np
from datasets import Dataset


def training_schedule(dataset: Dataset, steps: int, prompts_per_step: int, seed: int) -> Dataset:
    """The explicit data order: row g·prompts_per_step + i is prompt i of optimiser step g.

    Passes over the data are shuffled each on their own, and no step straddles two, so the prompts of a step are
    distinct (rows that fill no whole step are left out of that pass). The result is one epoch long, so that a resumed
    or rolled-back run finds its place by step number alone.
    """
    whole = len(dataset) // prompts_per_step * prompts_per_step
    if not whole:
        raise ValueError(
            f"A step takes {prompts_per_step} distinct prompts, but the data set has {len(dataset)}; "
            "lower prompts_per_step or add prompts."
        )
    rng = np.random.default_rng([seed, 7])
    passes = [rng.permutation(len(dataset))[:whole] for _ in range(-(-steps * prompts_per_step // whole))]
    return dataset.select(np.concatenate(passes)[: steps * prompts_per_step])
