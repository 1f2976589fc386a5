"""Procedural visual tasks: eight families, one per benchmark suite, each with an exact solver and a picture."""

from .dataset import conversation, make_dataset
from .families import FAMILIES, SUITES, Family, family_of
from .problems import Problem, parse_uid, sample_problems, split_of, vocabulary, write_response
from .verifier import PathVerifier

__all__ = [
    "FAMILIES",
    "SUITES",
    "Family",
    "PathVerifier",
    "Problem",
    "conversation",
    "family_of",
    "make_dataset",
    "parse_uid",
    "sample_problems",
    "split_of",
    "vocabulary",
    "write_response",
]
