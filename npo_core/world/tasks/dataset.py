"""Data sets for TRL: rows with uid, prompt, image, answer, suite and difficulty, and the explicit training schedule."""

from collections.abc import Sequence

from datasets import Dataset

from .problems import Problem


def conversation(problem: Problem, with_picture: bool, read: bool = False) -> list[dict]:
    """Chat messages of a problem.

    Args:
        problem: The task.
        with_picture: Put the PIL picture into the message itself.
        read: Ask for the glyphs of the picture in place of the path.
    """
    text = problem.reading_question if read else problem.question
    if not with_picture:
        return [{"role": "user", "content": text}]
    parts = [{"type": "image", "image": problem.picture()}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def make_dataset(problems: Sequence[Problem], text_only: bool = False) -> Dataset:
    """Rows (uid, prompt, image, answer, suite, difficulty), one per problem.

    Args:
        problems: Problems with distinct uids.
        text_only: Name the glyphs in the prompt instead of showing them; no image column.
    """
    rows = []
    for problem in problems:
        question = problem.question
        if text_only:
            question += " " + problem.reading
        row = {
            "uid": problem.uid,
            "prompt": [{"role": "user", "content": question}],
            "answer": problem.answer,
            "suite": problem.suite,
            "difficulty": problem.difficulty,
        }
        rows.append(row if text_only else {**row, "image": problem.picture()})
    return Dataset.from_list(rows)
