"""The rules that a row of a real data set keeps to, and what is made of one that does (ours)."""

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value

from ..guidance.answers import normalise_answer
from ..guidance.fingerprints import tokenizer_of
from ..guidance.verifiers import extract_answer
from ..runs.validation import DATA_COLUMNS
from ..trainer.dataset import decoded_rows
from ..trainer.pictures import inspect_picture, tokens_of_size
from ..trainer.prompts import WRITTEN_OUT

PLACEHOLDER = "<image>"
"""Where a question shows a picture; taken out, as chat templates put the pictures in front of the text themselves."""

ROLES = ("system", "user", "assistant", "tool")
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

INLINE = re.compile(r"data:image/[\w.+-]+;base64,")
"""A picture that is written into a text field."""

SOLUTION_END = "####"
"""Behind it stands the answer of a solution in GSM8K, and in data sets that are made like it."""

SHORT_FLOATS = {"float16": np.float16, "float32": np.float32}


class BrokenRule(ValueError):
    """The rule that a row breaks, and after a colon what breaks it."""


def reference_answer(value: Any) -> str:
    r"""Answer as the verifier compares it: text without white space at its ends; `\boxed{x}` becomes x, 3.0 becomes 3.

    A list of one answer is that answer; of a solution as GSM8K has it, the answer stands behind the last `####`.

    Raises:
        BrokenRule: There is none, it is neither text nor a number, or it holds a box among other words.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or value != value:
        raise BrokenRule("no answer")
    if isinstance(value, list):
        raise BrokenRule(f"answer of another kind: a list of {len(value)}; map a column that holds one answer")
    if not isinstance(value, str | int | float | Decimal):
        raise BrokenRule(f"answer of another kind: a {type(value).__name__}")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    text = text.rpartition(SOLUTION_END)[2].strip()
    if "\\boxed" in text:
        inner = extract_answer(text) or ""
        if "".join(text.strip("$. ").split()) != "\\boxed{" + "".join(inner.split()) + "}":
            raise BrokenRule(f"answer among other words: {text[-80:]!r}; map a column that holds the answer alone")
        text = inner
    if not normalise_answer(text):
        raise BrokenRule("no answer")
    return text


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Value of a row's column, or of the field inside of one that a name with dots stands for; None where it is not.

    So too the feature of a column among those of a source, whose fields inside of JSON are not known.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _holds_pictures(column: pa.ChunkedArray | None) -> bool:
    """Whether a column is stored as `datasets` stores pictures, or lists of them."""
    if column is None:
        return False
    listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    kind = column.type.value_type if listed else column.type
    return any(test(kind) for test in (pa.types.is_struct, pa.types.is_binary, pa.types.is_null))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BrokenRule(f"picture cannot be decoded: {error}") from error


def plain_messages(prompt: Any) -> tuple[list[dict[str, str]], int]:
    """Chat messages of plain text from a question or from messages, and how many placeholders of pictures they had.

    Args:
        prompt: Text, or messages (role, content) whose content is text or a list of parts of type text or image.

    Raises:
        BrokenRule: It is neither, or ends in something else than a user's words.
    """
    if isinstance(prompt, str) and WRITTEN_OUT.match(prompt):
        raise BrokenRule("prompt of another kind: chat messages written out as a text; decode them (json.loads)")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if not isinstance(messages, list):
        raise BrokenRule(f"prompt of another kind: a {type(messages).__name__}")
    placed, out = 0, []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BrokenRule(f"prompt of another kind: {str(message)[:80]} is no chat message")
        text = _with_placeholders(message.get("content") or "")
        placed += text.count(PLACEHOLDER)
        out.append({"role": message["role"], "content": re.sub(f" ?{PLACEHOLDER}", "", text).strip()})
    if not out or out[-1]["role"] != "user" or not out[-1]["content"]:
        raise BrokenRule("no question")
    return out, placed


def _with_placeholders(content: str | list) -> str:
    """Content of a message as text, with a placeholder for each picture among its parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BrokenRule(f"prompt of another kind: the content of a message is a {type(content).__name__}")
    out = ""
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "text"):
            raise BrokenRule(f"prompt of another kind: {str(part)[:80]} is neither text nor the place of a picture")
        out += PLACEHOLDER if part["type"] == "image" else part.get("text") or ""
    return out


def with_places(messages: Sequence[Mapping[str, str]], pictures: int) -> list[Mapping[str, Any]]:
    """Messages as a chat template gets them: the places of the pictures in front of the first user's words."""
    if not pictures:
        return list(messages)
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    parts = [[{"type": "text", "text": message["content"]}] for message in messages]
    parts[first] = [{"type": "image"}] * pictures + parts[first]
    return [{**message, "content": content} for message, content in zip(messages, parts, strict=True)]


class RowCheck:
    """Goes through the batches of a source: what is made of its rows, and which of them break a rule.

    Args:
        columns: Our columns to lists of theirs (of several for a joined uid); an absent uid is made. One of theirs
            may be a column, or a field inside of one, as in "reward_model.ground_truth".
        features: Features of the source.
        processor: Processor or tokenizer of the policy.
        name: Name of the source, for uids that are made.
        root: Folder that pictures given by path lie in.
        instruction: Text after each question; empty for none.
        limit: Longest prompt in tokens; 0 for no limit.

    Attributes:
        count: Rows checked.
        shown: Rows with a picture.
        refusals: Index of a row to its uid and to the first rule that it breaks.
    """

    def __init__(
        self,
        columns: Mapping[str, list[str]],
        features: Features,
        processor,
        *,
        name: str,
        root: str,
        instruction: str,
        limit: int,
    ):
        self.columns = {"uid": ["id"] if "id" in features else [], **columns}
        self.prefix = [] if "uid" in columns else [name]
        self.kind = next((kind for kind in ("image", "images") if kind in columns), None)
        self.processor, self.root, self.instruction, self.limit = processor, os.path.abspath(root), instruction, limit
        special = [token.content for token in tokenizer_of(processor).added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.source = features
        shape = {name: Value("string") for name in ("uid", "answer", "suite")}
        shape["prompt"] = List({"role": Value("string"), "content": Value("string")})
        if "difficulty" in columns:
            shape["difficulty"] = value_of(features, columns["difficulty"][0])
        self.features = Features({name: shape[name] for name in DATA_COLUMNS if name in shape and name in self.columns})
        self.pictured = Features({self.kind: Image() if self.kind == "image" else List(Image())}) if self.kind else None
        self.count, self.shown, self.by_path = 0, 0, False
        self.refusals: dict[int, tuple[str, str]] = {}
        self._without: dict[int, str] = {}
        self._first: dict[str, tuple[int, int]] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._tables: list[pa.Table] = []
        self._chunks: list[pa.Array] = []

    def add(self, batch: pa.Table) -> None:
        """Check the next rows of the source."""
        lines, shown, extra = [], [], []
        for index, row in enumerate(decoded_rows(batch, self.source), self.count):
            line, found, tokens = {"uid": ""}, [], 0
            try:
                self._fill(line, index, row)
                found = self._given(row)
                # a picture is one token in the text that the chat template makes
                tokens = sum(self._picture_tokens(picture) - 1 for picture in found)
                self._refuse_repeated(index, line, found)
                placed = line.pop("placed")
                if placed and not found:
                    raise BrokenRule("no picture: the question shows one")
                if placed not in (0, len(found)):
                    raise BrokenRule(f"number of pictures: {len(found)}, but {placed} of {PLACEHOLDER} in the question")
                self.shown += bool(found)
                if not found:
                    self._without[index] = line["uid"]
            except BrokenRule as broken:
                self.refusals[index] = line["uid"], str(broken)
            lines.append(line)
            shown.append(found)
            extra.append(tokens)
        if self.limit:
            self._refuse_long(lines, shown, extra)
        lines = [{} if index in self.refusals else line for index, line in enumerate(lines, self.count)]
        self._tables.append(pa.Table.from_pylist(lines, schema=self.features.arrow_schema))
        self.count += len(lines)
        if self.kind:
            name = self.columns[self.kind][0]
            self._keep(batch[name] if name in batch.column_names else None, shown)

    def finish(self) -> None:
        """After the last batch: rows without a picture are refused where others have one."""
        if self.shown:
            for index, uid in self._without.items():
                self.refusals.setdefault(index, (uid, "no picture: other rows have one"))

    def texts(self) -> Dataset:
        """All columns but the pictures, a row for each row of the source; empty where it was refused."""
        return Dataset(pa.concat_tables(self._tables))

    def pictures(self, source: Dataset) -> Dataset:
        """The column of pictures, a row for each row of the source: as it is stored, with full paths where by path."""
        theirs = self.columns[self.kind][0]
        if not self.by_path:
            stored = source.select_columns([theirs])
            stored = stored if theirs == self.kind else stored.rename_column(theirs, self.kind)
            return stored.cast_column(self.kind, self.pictured[self.kind])
        schema = self.pictured.arrow_schema
        kind = schema.field(0).type
        chunks = [chunk if chunk.type == kind else pa.array(chunk.to_pylist(), type=kind) for chunk in self._chunks]
        return Dataset(pa.table([pa.chunked_array(chunks)], schema=schema))

    def _fill(self, line: dict[str, Any], index: int, row: Mapping[str, Any]) -> None:
        """What is made of a row, pictures aside."""
        values = [value_of(row, name) for name in self.columns["uid"]] or [index]
        if any(value is None or value == "" for value in values):
            raise BrokenRule(f"no uid: {' or '.join(self.columns['uid'])} is empty")
        if not all(isinstance(value, str | int) for value in values):
            raise BrokenRule(f"uid of another kind: {values[0]!r} is neither text nor a whole number")
        line["uid"] = "/".join(map(str, [*self.prefix, *values]))
        line["prompt"], line["placed"] = plain_messages(value_of(row, self.columns["prompt"][0]))
        if self.instruction:
            line["prompt"][-1]["content"] += "\n" + self.instruction
        for message in line["prompt"]:
            if token := self.special.search(message["content"]):
                raise BrokenRule(f"special token in the prompt: {token.group()}")
        if "answer" in self.columns:
            answer = value_of(row, self.columns["answer"][0])
            line["answer"] = reference_answer(self._as_written(answer))
        for name in ("suite", "difficulty"):
            if name in self.columns:
                line[name] = value_of(row, self.columns[name][0])
                if line[name] is None or line[name] == "":
                    raise BrokenRule(f"no {name}")
        if "suite" in line:
            if not isinstance(line["suite"], str | int | float):
                raise BrokenRule(f"suite of another kind: {line['suite']!r} is neither text nor a number")
            line["suite"] = str(line["suite"])

    def _as_written(self, answer: Any) -> Any:
        """A number of single or half precision in the digits that tell it apart: 0.1, and not 0.10000000149."""
        kind = value_of(self.source, self.columns["answer"][0])
        if isinstance(answer, float) and isinstance(kind, Value) and kind.dtype in SHORT_FLOATS:
            return float(str(SHORT_FLOATS[kind.dtype](answer)))
        return answer

    def _refuse_repeated(self, index: int, line: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> None:
        content = hash((str(line["prompt"]), line.get("answer"), *((each["path"], each["bytes"]) for each in found)))
        before, known = self._first.setdefault(line["uid"], (index, content))
        if known != content:
            raise BrokenRule(f"uid of another row: row {before} has it, with other content")
        if before != index:
            raise BrokenRule(f"row repeated: it is row {before} again")

    def _given(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's pictures: the bytes, or the full path, that each is decoded from."""
        values = value_of(row, self.columns[self.kind][0]) if self.kind else None
        if self.kind == "images" and not isinstance(values, list | None):
            values = [values]
        found = []
        for value in (values if self.kind == "images" else [values]) or ():
            if isinstance(value, list):
                raise BrokenRule("list of pictures: map this column to images, not to image")
            given = value if isinstance(value, Mapping) else {"path" if isinstance(value, str) else "bytes": value}
            if given.get("bytes") is not None:
                found.append({"bytes": given["bytes"], "path": None})
            elif inline := INLINE.match(given.get("path") or ""):
                found.append({"bytes": _decoded(given["path"][inline.end() :]), "path": None})
            elif given.get("path"):
                found.append({"bytes": None, "path": self._inside(given["path"])})
        return found

    def _inside(self, path: str) -> str:
        """Full path of a picture."""
        if URL.match(path):
            raise BrokenRule(f"picture by URL: {path} is not downloaded; save the pictures, and give their paths")
        full = os.path.normpath(os.path.join(self.root, path))
        if os.path.commonpath([self.root, full]) != self.root:
            raise BrokenRule(f"picture outside of image_root: {path} is not in {self.root}")
        if not os.path.isfile(full):
            raise BrokenRule(f"picture missing: there is no file {full}")
        return full

    def _picture_tokens(self, picture: Mapping[str, Any]) -> int:
        """Tokens of a picture from its header, by the processor's own count; 1 where it has none."""
        try:
            with open(picture["path"], "rb") if picture["path"] else io.BytesIO(picture["bytes"]) as stream:
                size = inspect_picture(stream)
            # a picture that its file stores on its side has as many tokens upright, so the header's word is enough
            if size not in self._tokens:
                self._tokens[size] = tokens_of_size(self.processor, *size) or 1
        except (OSError, ValueError) as error:
            raise BrokenRule(str(error)) from error
        return self._tokens[size]

    def _refuse_long(self, lines: Sequence[Mapping], shown: Sequence[Sequence], extra: Sequence[int]) -> None:
        """Refuse prompts of more tokens than the limit; `extra` are those that pictures add to the text."""
        asked = [place for place in range(len(lines)) if self.count + place not in self.refusals]
        if not asked:
            return
        chats = [with_places(lines[place]["prompt"], len(shown[place])) for place in asked]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        ids = tokenizer_of(self.processor)(texts, add_special_tokens=False)["input_ids"]
        for place, tokens in zip(asked, ids, strict=True):
            length = len(tokens) + extra[place]
            if length > self.limit:
                reason = f"prompt too long: {length} tokens, at most {self.limit}"
                self.refusals[self.count + place] = lines[place]["uid"], reason

    def _keep(self, column: pa.ChunkedArray | None, shown: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Note the pictures of a batch, without copying those that are stored in the source as pictures are."""
        if any(picture["path"] for found in shown for picture in found) or not _holds_pictures(column):
            self.by_path = True
            values = [found if self.kind == "images" else found[0] if found else None for found in shown]
            self._chunks.append(pa.array(values, type=self.pictured.arrow_schema.field(0).type))
        else:
            self._chunks += column.chunks
