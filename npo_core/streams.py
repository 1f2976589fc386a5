"""Every stream of random numbers that this package draws from, named once: no two may share a key.

A key is [seed, first place, tag, further places] with what a stream has of them; numpy's `SeedSequence` makes it into a
generator, or into the seed of torch. Tags lie below 32 and above 0, texts are printable, so neither can stand for the
other. What a stream draws does not depend on what other streams have drawn: a run that is resumed, or a measurement to
which pairs are added, draws the same again. All of this is ours. The small world's own draws (facts, problems, corpus)
have their seeds in its settings.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Stream:
    """A stream: one key per place.

    Attributes:
        draws: What it draws.
        of: Whose seed it hangs on; streams of different owners never meet.
        place: What the numbers and texts behind the seed are.
        tag: Number that tells it from others of as many places; 0 for none.
    """

    draws: str
    of: Literal["run", "data", "measurement", "gates", "gain", "sample", "test"]
    place: tuple[str, ...] = ()
    tag: int = 0

    def key(self, seed: int, *place: int | str) -> list[int]:
        """The key at a place.

        Raises:
            ValueError: More or fewer places than the stream has.
        """
        if len(place) != len(self.place):
            raise ValueError(f"{self.draws}: the key has the places {self.place}; got {place}.")
        words = [[*one.encode()] if isinstance(one, str) else [one] for one in place]
        tag = [self.tag] if self.tag else []
        return [seed, *(words[0] if words else []), *tag, *(word for later in words[1:] for word in later)]

    def generator(self, seed: int, *place: int | str) -> np.random.Generator:
        """A fresh generator of numpy."""
        return np.random.default_rng(self.key(seed, *place))

    def seed(self, seed: int, *place: int | str) -> int:
        """A seed for torch, from 0 to 2³² − 1."""
        return int(np.random.SeedSequence(self.key(seed, *place)).generate_state(1)[0])


DATA_ORDER = Stream("the order of the training prompts, pass by pass", "data", tag=7)
GYM = Stream("problems of a task of reasoning-gym, chunk by chunk", "data", ("split", "task", "chunk"), 8)

PROBE = Stream("which mistakes a probe samples (numpy), and their rollouts (torch)", "run", ("policy step",), 1)
DIVERGENCE = Stream("which rollouts of a probe V̂ is measured on", "run", ("policy step",), 2)
CACHE = Stream("rollouts for the guidance cache, a turn after the other", "run", ("policy step", "turn"), 3)
BRANCH = Stream("sampling in training after a roll-back", "run", ("branch",), 4)
RANDOM_PLAN = Stream("steps and distances of random interventions", "run", tag=5)
OWN_PAST = Stream("prompts that ExGRPO replays in a step", "run", ("policy step",), 6)
POOL = Stream("which of a prompt's stored trajectories guides", "run", ("policy step", "uid"))

PAIRS = Stream("resamples of prompts behind the intervals of Q, V and S", "measurement", ("origin",))
PREMISE = Stream("resamples of prompts behind the intervals of the premise", "measurement", ("origin",), 1)
MEASURED = Stream("a policy's rollouts; a second, independent sample is number 1", "measurement", ("sample", "policy"))

GATES = Stream("resamples of prompts behind the intervals of the gates' premise; the origin stands as seed", "gates")

GAIN = Stream("guides of a source in the gain study", "gain", ("origin", "source"))

PROCESS = Stream("off-line rollouts of one of several processes", "sample", ("process",))

TEST_ITEMS = Stream("resamples of test items behind the intervals of a score", "test")

STREAMS = {name: value for name, value in globals().items() if isinstance(value, Stream)}
"""All streams by name."""
