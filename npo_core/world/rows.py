"""The rules that a row of a real data set keeps to, and what is made of one that does (ours)."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from ..guidance.answers import normalise_answer
from ..guidance.fingerprints import tokenizer_of
from ..guidance.verifiers import extract_answer
from ..runs.validation import DATA_COLUMNS

PLACEHOLDER = "<image>"
"""Where a question shows a picture; taken out, as chat templates put the pictures in front of the text themselves."""

ROLES = ("system", "user", "assistant", "tool")
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class BrokenRule(ValueError):
    """The rule that a row breaks, and after a colon what breaks it."""


def reference_answer(value: Any) -> str:
    r"""Answer as the verifier compares it: text without white space at its ends; `\boxed{x}` becomes x, 3.0 becomes 3.

    Raises:
        BrokenRule: There is none, it is neither text nor a number, or it holds a box among other words.
    """
    if value is None or value != value:
        raise BrokenRule("no answer")
    if not isinstance(value, str | int | float):
        raise BrokenRule(f"answer of another kind: a {type(value).__name__}")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if "\\boxed" in text:
        inner = extract_answer(text) or ""
        if "".join(text.strip("$. ").split()) != "\\boxed{" + "".join(inner.split()) + "}":
            raise BrokenRule(f"answer among other words: {text[-80:]!r}; map a column that holds the answer alone")
        text = inner
    if not normalise_answer(text):
        raise BrokenRule("no answer")
    return text


def plain_messages(prompt: Any) -> tuple[list[dict[str, str]], int]:
    """Chat messages of plain text from a question or from messages, and how many placeholders of pictures they had.

    Args:
        prompt: Text, or messages (role, content) whose content is text or a list of parts of type text or image.

    Raises:
        BrokenRule: It is neither, or ends in something else than a user's words.
    """
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
        columns: Our columns to lists of theirs (of several for a joined uid); an absent uid is made.
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
        shape = {name: Value("string") for name in ("uid", "answer", "suite")}
        shape["prompt"] = List({"role": Value("string"), "content": Value("string")})
        if "difficulty" in columns:
            shape["difficulty"] = features[columns["difficulty"][0]]
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
        for index, row in enumerate(batch.to_pylist(), self.count):
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
            self._keep(batch[self.columns[self.kind][0]], shown)

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
        values = [row[name] for name in self.columns["uid"]] or [index]
        if any(value is None or value == "" for value in values):
            raise BrokenRule(f"no uid: {' or '.join(self.columns['uid'])} is empty")
        line["uid"] = "/".join(map(str, [*self.prefix, *values]))
        line["prompt"], line["placed"] = plain_messages(row[self.columns["prompt"][0]])
        if self.instruction:
            line["prompt"][-1]["content"] += "\n" + self.instruction
        for message in line["prompt"]:
            if token := self.special.search(message["content"]):
                raise BrokenRule(f"special token in the prompt: {token.group()}")
        line["answer"] = reference_answer(row[self.columns["answer"][0]])
        for name in ("suite", "difficulty"):
            if name in self.columns:
                line[name] = row[self.columns[name][0]]
                if line[name] is None or line[name] == "":
                    raise BrokenRule(f"no {name}")

    def _refuse_repeated(self, index: int, line: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> None:
        content = hash((str(line["prompt"]), line["answer"], *((each["path"], each["bytes"]) for each in found)))
        before, known = self._first.setdefault(line["uid"], (index, content))
        if known != content:
            raise BrokenRule(f"uid of another row: row {before} has it, with other content")
        if before != index:
            raise BrokenRule(f"row repeated: it is row {before} again")

    def _given(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's pictures: the bytes, or the full path, that each is decoded from."""
        values = row[self.columns[self.kind][0]] if self.kind else None
        found = []
        for value in (values if self.kind == "images" else [values]) or ():
            if isinstance(value, list):
                raise BrokenRule("list of pictures: map this column to images, not to image")
            given = value if isinstance(value, Mapping) else {"path" if isinstance(value, str) else "bytes": value}
            if given.get("bytes") is not None:
                found.append({"bytes": given["bytes"], "path": None})
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
        """Tokens of a picture from its header, by the processor's own count; 1 where there is no limit to keep to."""
        try:
            with Pictures.open(picture["path"] or io.BytesIO(picture["bytes"])) as opened:
                width, height = opened.size
        except (OSError, ValueError, Pictures.DecompressionBombError) as error:
            raise BrokenRule(f"picture cannot be decoded: {str(error)[:200]}") from error
        if not self.limit:
            return 1
        # a picture that its file stores on its side has as many tokens upright, so the header's word is enough
        if (height, width) not in self._tokens:
            images = self.processor.image_processor
            try:
                patches = images.get_number_of_image_patches(height, width)
            except ValueError as error:
                raise BrokenRule(f"picture of a shape that has no tokens: {width} × {height}, {error}") from error
            self._tokens[height, width] = patches // images.merge_size**2
        return self._tokens[height, width]

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

    def _keep(self, column: pa.ChunkedArray, shown: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Note the pictures of a batch, without copying those that are stored in the source."""
        inner = column.type.value_type if pa.types.is_list(column.type) else column.type
        if any(picture["path"] for found in shown for picture in found) or pa.types.is_string(inner):
            self.by_path = True
            values = [found if self.kind == "images" else found[0] if found else None for found in shown]
            self._chunks.append(pa.array(values, type=self.pictured.arrow_schema.field(0).type))
        else:
            self._chunks += column.chunks
