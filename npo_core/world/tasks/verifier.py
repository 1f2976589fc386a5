r"""What is right in the small world: the whole path in the box, and with the box the response ends (ours)."""

from collections.abc import Mapping
from typing import Any

from ...guidance.verdicts import Verdict
from ...guidance.verifiers import BoxedVerifier, behind_answer


class PathVerifier(BoxedVerifier):
    r"""`BoxedVerifier`, to which a right answer is wrong where the response goes on behind it.

    Else nothing pulls against such text: at some learning rates a policy ends at `\boxed{ 7 0 3 1 } } } }` up to the
    limit, right and rewarded, and has no response left that could be a guide (docs/gates.md).
    """

    def __call__(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Verify one completion; arguments and errors are those of `BoxedVerifier`."""
        verdict = super().__call__(completion, row)
        return Verdict.WRONG if verdict is Verdict.CORRECT and behind_answer(completion) else verdict
