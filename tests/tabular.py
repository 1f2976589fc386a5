"""A policy small enough to enumerate: two tokens at most over {end, a, b}, a softmax per prefix, seven sequences."""

import numpy as np

SEQUENCES = ((0,), *((first, second) for first in (1, 2) for second in (0, 1, 2)))
"""All responses; token 0 ends one, and two tokens are the longest."""


class Tabular:
    """Logits for the first token, and for the second after each first token: nine parameters."""

    def __init__(self, first, second):
        self.first = _softmax(np.asarray(first, dtype=float))
        self.second = _softmax(np.asarray(second, dtype=float))

    @classmethod
    def drawn(cls, seed: int, scale: float = 1.0) -> "Tabular":
        rng = np.random.default_rng(seed)
        return cls(scale * rng.normal(size=3), scale * rng.normal(size=(2, 3)))

    def token_logps(self, sequence) -> np.ndarray:
        """ln π of each token, shape (tokens,)."""
        token_ps = [self.first[sequence[0]], *(self.second[sequence[0] - 1][token] for token in sequence[1:])]
        return np.log(token_ps)

    def probabilities(self) -> np.ndarray:
        """π of each of `SEQUENCES`."""
        return np.array([np.exp(self.token_logps(sequence).sum()) for sequence in SEQUENCES])

    def token_gradients(self, sequence) -> np.ndarray:
        """∇ ln π of each token in the nine logits, shape (tokens, 9): one-hot minus softmax, in the prefix's block."""
        out = np.zeros((len(sequence), 9))
        out[0, :3] = np.eye(3)[sequence[0]] - self.first
        for second in sequence[1:]:
            block = slice(3 * sequence[0], 3 * sequence[0] + 3)
            out[1, block] = np.eye(3)[second] - self.second[sequence[0] - 1]
        return out

    def gradient(self, sequence, weights=None) -> np.ndarray:
        """1/|y| · Σ w_t ∇ ln π(y_t), shape (9,)."""
        weights = np.ones(len(sequence)) if weights is None else weights
        return weights @ self.token_gradients(sequence) / len(sequence)


def log_weights(policy: Tabular, source: Tabular, sequence) -> np.ndarray:
    """ln w = ln π − ln q of each token."""
    return policy.token_logps(sequence) - source.token_logps(sequence)


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)
