"""The process of its own that reasoning-gym runs in: it makes problems there, and scores answers (ours).

Apart, for two reasons. Some scorers evaluate what a policy wrote (`eval`, sympy's `parse_expr`), so that an answer such
as 9**9**9 would hang a run, and "R99999999" in a cube's moves fill the memory: here an answer has seconds and a share
of memory, can write no file, and at worst ends this process, after which a fresh one goes on. And some tasks go through
sets or draw from the global generators, so that their problems hang on Python's hash seed: here it is fixed.

One line of JSON in, one out. An entry, which scoring needs, leaves the process as a text that only it reads again.
"""

import base64
import contextlib
import dataclasses
import functools
import json
import os
import pickle
import random
import resource
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

CHUNK = 500
"""Problems of one seed of reasoning-gym; it seeds problem i with seed + i, and some tasks make all of them at once."""

MEMORY = 4 << 30
"""Bytes of address space of the process."""

PATIENCE = 0.5
"""Seconds after which the problems that are made by then are handed over."""

SECONDS = 10.0
"""Wall-clock seconds for the score of an answer; those of the tasks themselves take 0.02 s at most."""

NONSENSE = "?"
"""Answer that is right nowhere: a task that takes it for right does not look at answers."""

EXAMPLES = ("example_answer", "example_correct_answer", "possible_answer")
"""Where a task whose answer is None keeps one of those that are right, in its metadata."""

KINDS = {"bool": bool, "int": int, "float": float, "str": str, "list": list | tuple, "dict": dict}
"""Types of a task's settings, as JSON has them; a truth value is also an int, so it comes first."""


class ProcessEnded(RuntimeError):
    """The process ended, or did not answer in time."""


class GymProcess:
    """Its side of whoever asks; the process is started when it is first asked, and again after it was ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._end: Callable[[], Any] | None = None

    def ask(self, what: str, seconds: float | None = None, **request: Any) -> dict[str, Any]:
        """The answer to a request, "error" in it where reasoning-gym raised one.

        Raises:
            ProcessEnded: It ended, or did not answer within `seconds`; the next request starts another.
        """
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        line = b""
        try:
            self._process.stdin.write(json.dumps({"what": what, **request}).encode() + b"\n")
            self._process.stdin.flush()
            if seconds is None or select.select([self._process.stdout], [], [], seconds)[0]:
                line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended, which is said below
        finally:
            if not line:  # or an answer that nobody waited for, as after an interrupt, would be taken for the next one
                self.close()
        if not line:
            raise ProcessEnded(f"the process that reasoning-gym runs in ended or did not answer in time, at {what!r}.")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _start(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        )
        self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():  # so that nobody's seconds are spent on its start
            self.close()
            raise ProcessEnded("the process that reasoning-gym runs in did not start; what it said stands above.")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # what it had not read is nobody's any more
            pipe.close()


def serve() -> None:
    """Answer requests from standard input until it ends; the loop of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to this process too; who asks decides
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):  # tasks print, and what a policy wrote may ask for input
        os.dup2(nothing, stream)
    import reasoning_gym  # noqa: F401  before the limits, so that what it lacks is said and what it loads is kept

    os.dup2(nothing, 2)
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answered: dict[str, Callable[..., dict[str, Any]]] = {"tasks": _tasks, "make": _make, "score": _score}
    replies.write("ready\n")
    replies.flush()
    for line in requests:
        request = json.loads(line)
        try:
            reply = json.dumps(answered[request.pop("what")](**request))
        except Exception as error:  # whatever a task of somebody else's raises at its settings
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"})
        replies.write(reply + "\n")
        replies.flush()


def _tasks() -> dict[str, Any]:
    """Tasks by name, each with its settings: type and default of each, the type empty where the default has none."""
    from reasoning_gym.factory import DATASETS

    tasks: dict[str, dict[str, tuple[str, str]]] = {}
    for task, (_, kind) in DATASETS.items():
        tasks[task] = {}
        for one in dataclasses.fields(kind):
            default = one.default_factory() if callable(one.default_factory) else one.default
            kinds = (name for name, types in KINDS.items() if isinstance(default, types))
            tasks[task][one.name] = (next(kinds, ""), repr(default))
    return {"tasks": tasks}


@functools.lru_cache(maxsize=8)
def _dataset(task: str, settings: str, seed: int) -> Any:
    import numpy as np
    from reasoning_gym import create_dataset

    random.seed(seed)
    np.random.seed(seed)
    return create_dataset(task, seed=seed, size=CHUNK, **json.loads(settings))


def _make(task: str, settings: Mapping[str, Any], seed: int, first: int) -> dict[str, Any]:
    """Problems of a chunk in their order, from `first` on: as many as are made while one is patient."""
    dataset, problems, began = _dataset(task, json.dumps(settings), seed), [], time.monotonic()
    for index in range(first, CHUNK):
        problems.append(_problem(dataset, index))
        if time.monotonic() - began > PATIENCE:
            break
    return {"problems": problems}


def _problem(dataset: Any, index: int) -> dict[str, Any]:
    """A problem with the scores of its own answer and of nonsense, or the error at which it was not made."""
    try:
        entry = dataset[index]
    except Exception as error:  # some tasks give up at a problem, each with an error of its own
        return {"error": f"{type(error).__name__}: {error}"}
    answer = entry["answer"]
    if answer is None:
        answer = next((entry["metadata"][name] for name in EXAMPLES if name in entry["metadata"]), None)
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer)
    return {
        "question": entry["question"],
        "answer": answer,
        "entry": base64.b64encode(pickle.dumps(entry)).decode("ascii"),
        "own": 0.0 if answer is None else _scored(dataset, answer.strip(), entry)["score"],
        "nonsense": _scored(dataset, NONSENSE, entry)["score"],
    }


def _score(task: str, settings: Mapping[str, Any], entry: str, answer: str) -> dict[str, Any]:
    made = pickle.loads(base64.b64decode(entry))  # by `_problem`, in a process as this one
    return _scored(_dataset(task, json.dumps(settings), 0), answer, made)


def _scored(dataset: Any, answer: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The score, and what the scorer raised if it did: such an answer is wrong, and the caller says so."""
    try:
        return {"score": float(dataset.score_answer(answer, entry)), "raised": ""}
    except Exception as error:  # some scorers raise at an answer of another form than theirs, each an error of its own
        return {"score": 0.0, "raised": f"{type(error).__name__}: {error}"[:200]}
