"""Real data sets: files, folders and hub names, checked row by row before anything is trained on them.

One reader for training, test data and signal. Rows are read in batches from an Arrow table on disk, their values
decoded, as a field of mixed types is stored as JSON text. A picture stays there as it was encoded until its row is
asked for; the check opens its header and looks at its end. Nothing is truncated: a row that breaks a rule (`rows`) is
listed and refused, or left out if the caller says so.
"""

import glob
import hashlib
import json
import logging
import lzma
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from ..declaration import nearest, require
from ..files import write_text
from ..guidance.fingerprints import tokenizer_of
from ..runs.validation import DATA_COLUMNS
from .rows import RowCheck

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
"""Data files that can be read, by suffix."""

PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed data files, behind the other one."""

HOW: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {".csv": {"keep_default_na": False}, ".tsv": {"keep_default_na": False, "sep": "\t"}}
)
"""What a reader must be told: an answer may be the word None, or NA."""

BATCH = 256
"""Rows in memory at a time, with their encoded pictures."""

LISTED = 10
"""Refused rows in a message; all are in the file."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SPLITS = {"train", "validation", "test"}
EDGES = ("shortest_edge", "longest_edge")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSettings:
    r"""Where rows come from and what they must keep to (ours).

    Attributes:
        source: File (.parquet, .jsonl, .json, .csv, .tsv, also compressed), folder with parquet files, folder that
            `datasets` saved, or hub name.
        split: Split of a folder or hub name; a file has one. Empty: the only one of a saved folder.
        columns: Our column to theirs; if empty, the columns that carry our names. A uid "a/b" joins columns a and b;
            "a.b" is the field b inside of column a.
        instruction: Text on a line of its own after each question, such as "Put the answer in \boxed{}."
        image_root: Folder of pictures that are given by path; empty: the folder of `source`.
        max_prompt_length: Longest prompt in tokens, chat template and pictures included; 0: no limit.
        skip_refused: Leave out the rows that break a rule; otherwise one is enough to refuse the data set.

    Raises:
        ValueError: No source, a negative length, or a column that is none of ours.
    """

    source: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""
    image_root: str = ""
    max_prompt_length: int = 0
    skip_refused: bool = False

    def __post_init__(self):
        require(bool(self.source), "source", self.source, "a file, a folder or a hub name")
        require(self.max_prompt_length >= 0, "max_prompt_length", self.max_prompt_length, "at least 0")
        for name in self.columns:
            if name not in DATA_COLUMNS:
                raise ValueError(
                    f"columns names {name!r}{nearest(name, DATA_COLUMNS)} Allowed: {', '.join(DATA_COLUMNS)}."
                )

    @property
    def name(self) -> str:
        """Name of the source: of the file without its suffix, of the folder, or of the data set on the hub."""
        path = Path(self.source)
        return (
            path.name.removesuffix("".join(_suffixes(path))) if _suffixes(path)[0] in READERS else path.absolute().name
        )


def _suffixes(path: Path) -> tuple[str, str]:
    """The suffix that says how a file is read, and that of its compression or nothing."""
    if path.suffix in PACKED:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def read_rows(source: str | Path, split: str | None = None) -> Dataset:
    """Rows of a file, folder or hub name as they are, unchecked. No code of a data set is ever run.

    Args:
        source: As `DataSettings.source`.
        split: Split of a folder or hub name; None: the only one of a saved folder, all parquet files, "train" of a hub
            name.

    Raises:
        FileNotFoundError: There is nothing at `source`, here or on the hub.
        ValueError: A format that is not read, no rows, or no such split.
    """
    path = Path(source)
    kind = _suffixes(path)[0]
    if not path.exists():
        if kind in READERS or not HUB_NAME.fullmatch(str(source)):
            raise FileNotFoundError(f"There is no data set at {path}.")
        return _from_hub(str(source), split or "train")
    if path.is_file() and kind not in READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}; {', '.join(READERS)} and folders of datasets are read.")
    if "::" in str(path.absolute()):
        raise ValueError(
            f"{path} has '::' in its name or place, which `datasets` reads as a chain of archives; rename it."
        )
    files = _parquet_files(path, split) if path.is_dir() else []
    try:
        if files:
            rows = load_dataset("parquet", data_files=[glob.escape(file) for file in files], split="train")
        elif path.is_dir():
            rows = load_from_disk(str(path))
        else:
            # a name is not a pattern: "rows[1].jsonl" and "what?.jsonl" are files too
            rows = load_dataset(READERS[kind], data_files=glob.escape(str(path)), split="train", **HOW.get(kind, {}))
    except (FileNotFoundError, PermissionError):
        raise
    except (DatasetsError, ValueError, IndexError, StopIteration, OSError, EOFError, lzma.LZMAError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0] or "it is empty"
        raise ValueError(f"{path} holds no rows that can be read: {reason}.") from error
    if isinstance(rows, Dataset):
        return rows
    if split not in rows:
        asked = "give the folder of one" if split is None else f"{split!r} is none of them"
        raise ValueError(f"{path} holds several splits ({', '.join(rows)}); {asked}.")
    return rows[split]


def _parquet_files(folder: Path, split: str | None) -> list[str]:
    """Parquet files of a split, by what their names begin with or a folder; where no name tells, all are "train"."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*.parquet"))]
    splits = {file: {re.split(r"[-_.]", file.name)[0], *file.parts[:-1]} for file in files}
    untold = split == "train" and not any(SPLITS & names for names in splits.values())
    chosen = [str(folder / file) for file in files if split is None or untold or split in splits[file]]
    if files and not chosen:
        raise ValueError(f"{folder} has no parquet file of split {split!r}; it has {', '.join(map(str, files[:5]))}.")
    return chosen


def _from_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except (OSError, DatasetsError) as error:
        raise FileNotFoundError(
            f"{name} is nothing on this machine, and the hub does not give it ({error}). Where there is a connection, "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER`; then give FOLDER as the source."
        ) from error


def load_data(
    settings: DataSettings, processor, refused: Path | None = None, *, judged: bool = True, others: bool = False
) -> Dataset:
    r"""Rows that can be trained on, in the order of the source (rules: ours).

    Columns: uid (`<name of the source>/<its id column, else the row's index>` where none is mapped), prompt (chat
    messages of plain text), answer (text; `\boxed{x}` becomes x), suite and difficulty where mapped, and image or
    images, decoded when read. Pictures go in front of the first user's words, wherever the question had them.

    Args:
        settings: Source and rules.
        processor: Processor of the policy, or the tokenizer of one that reads text only.
        refused: File that gets a JSON line (index, uid, reason) for each row that breaks a rule; empty if none does.
        judged: Every row needs an answer that `BoxedVerifier` can compare. False is for a verifier of one's own.
        others: Keep the other columns too, as they are, for a verifier that reads them.

    Raises:
        FileNotFoundError: As `read_rows`.
        ValueError: No rows, a mapped column that is not there, rows that break a rule and are not skipped, or a
            processor that cannot read the pictures.
    """
    return checked_rows(
        read_rows(settings.source, settings.split or None), settings, processor, refused, judged=judged, others=others
    )


def checked_rows(
    rows: Dataset, settings: DataSettings, processor, refused: Path | None = None, *, judged: bool, others: bool
) -> Dataset:
    """What `load_data` makes of rows that were read, or made, already; arguments and errors are its own."""
    columns = _columns(rows, settings, judged)
    if {"image", "images"} & columns.keys():
        if tokenizer_of(processor) is processor:
            raise ValueError("columns maps pictures, but the policy has a tokenizer only; leave image and images out.")
        if settings.max_prompt_length:
            _limited(processor)
    path = Path(settings.source)
    if not len(rows):
        raise ValueError(f"{settings.source} holds no rows.")
    check = RowCheck(
        columns,
        rows.features,
        processor,
        name=settings.name,
        root=settings.image_root or str(path.parent if path.is_file() else path),
        instruction=settings.instruction,
        limit=settings.max_prompt_length,
    )
    needed = dict.fromkeys(_column_of(name, rows) for names in check.columns.values() for name in names)
    for batch in rows.select_columns(list(needed)).with_format("arrow").iter(BATCH):
        check.add(batch)
    check.finish()
    _report(settings, check, refused)
    made = check.texts()
    if check.shown:
        made = concatenate_datasets([made, check.pictures(rows)], axis=1)
    if others and (
        rest := [name for name in rows.column_names if name not in made.column_names and name != check.kind]
    ):
        made = concatenate_datasets([made, rows.select_columns(rest)], axis=1)
    kept = [index for index in range(check.count) if index not in check.refusals]
    return made.select(kept) if check.refusals else made


def _column_of(name: str, rows: Dataset) -> str:
    """The column that a name stands for, or that the field is in which it stands for."""
    return name if name in rows.column_names else name.partition(".")[0]


def _columns(rows: Dataset, settings: DataSettings, judged: bool) -> dict[str, list[str]]:
    """Our columns to lists of theirs, which are all there."""
    there = rows.column_names
    columns = {ours: [theirs] for ours, theirs in settings.columns.items()}
    columns = columns or {name: [name] for name in DATA_COLUMNS if name in there}
    if "uid" in columns and columns["uid"][0] not in there:
        columns["uid"] = columns["uid"][0].split("/")
    for ours, theirs in columns.items():
        for name in theirs:
            if _column_of(name, rows) not in there:
                raise ValueError(f"{settings.source} has no {name!r} for {ours}{nearest(name, there)} It has {there}.")
    if not judged:
        columns.pop("answer", None)
    missing = [name for name in ("prompt", "answer") if name not in columns and (judged or name == "prompt")]
    if missing:
        raise ValueError(f"columns does not say which of {there} in {settings.source} is {' and '.join(missing)}.")
    if {"image", "images"} <= columns.keys():
        raise ValueError(f"{settings.source} has image and images; say in columns which of them is shown.")
    return columns


def _report(settings: DataSettings, check: RowCheck, refused: Path | None) -> None:
    """Write the list of refused rows, and refuse the data set unless they may be left out."""
    lines = [{"index": index, "uid": uid, "reason": why} for index, (uid, why) in sorted(check.refusals.items())]
    if refused is not None:
        refused.parent.mkdir(parents=True, exist_ok=True)
        write_text(refused, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if not lines:
        return
    counts = Counter(line["reason"].partition(":")[0] for line in lines)
    told = f"{settings.source}: {len(lines)} of {check.count} rows break the rules ("
    told += ", ".join(f"{rule}: {number}" for rule, number in counts.most_common()) + ")"
    where = "" if refused is None else f" All are listed in {refused}."
    if settings.skip_refused and len(lines) < check.count:
        logger.warning("%s and are left out.%s", told, where)
        return
    first = [f"  row {line['index']}, uid {line['uid']!r}: {line['reason']}" for line in lines[:LISTED]]
    advice = "" if settings.skip_refused else "\nRepair them, or set skip_refused to leave them out."
    raise ValueError(f"{told}.{where}\n" + "\n".join(first) + advice)


class RowsByUid(Mapping[str, Mapping[str, Any]]):
    """Rows of a data set by uid, each read, and its pictures decoded, when it is asked for (ours).

    Args:
        dataset: Rows with distinct uids.

    Raises:
        ValueError: Two rows share a uid.
    """

    def __init__(self, dataset: Dataset):
        uids = dataset["uid"][:]
        _require_distinct(uids)
        self.dataset, self.places = dataset, {uid: place for place, uid in enumerate(uids)}

    def __getitem__(self, uid: str) -> Mapping[str, Any]:
        return self.dataset[self.places[uid]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, uid: object) -> bool:
        return uid in self.places


def hold_out(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows, and `count` test rows: those whose uid has the smallest hash (ours).

    The order of the rows does not matter. When rows are added, one that was trained on never becomes a test row, and
    test rows change only where an added row takes the place of one, which is count·added/rows of them on average.

    Args:
        dataset: Rows with distinct uids.
        count: Test rows.
        seed: Another seed holds out other rows.

    Raises:
        ValueError: Fewer than 0 test rows, none left to train on, or two rows that share a uid.
    """
    uids = dataset["uid"][:]
    require(0 <= count < len(uids), "count", count, f"from 0 to {len(uids) - 1}, as there are {len(uids)} rows")
    _require_distinct(uids)

    def place(index: int) -> bytes:
        return hashlib.sha256(f"{seed} {uids[index]}".encode()).digest()

    test = set(sorted(range(len(uids)), key=place)[:count])
    return dataset.select([index for index in range(len(uids)) if index not in test]), dataset.select(sorted(test))


def _require_distinct(uids: Sequence[str]) -> None:
    distinct = len(set(uids))
    if distinct < len(uids):
        raise ValueError(f"{len(uids)} rows have {distinct} uids between them; each row needs its own.")


def image_policy(processor, min_pixels: int = 0, max_pixels: int = 0) -> None:
    """Set the picture sizes of a Qwen-VL processor, for training, off-line sampling and evaluation alike (ours).

    Larger and smaller pictures are resized at their aspect ratio. vLLM reads its own processor from the policy's
    folder and must be given the same limits, see `pictures.picture_limits`.

    Args:
        processor: Processor of the policy, changed in place.
        min_pixels: Smallest picture in pixels (height × width); 0 leaves the limit as it is.
        max_pixels: Largest picture in pixels; 0 leaves the limit as it is.

    Raises:
        ValueError: A minimum above the maximum, a maximum below one token, or a processor without such limits.
    """
    images = _limited(processor)
    low, high = min_pixels or images.size[EDGES[0]], max_pixels or images.size[EDGES[1]]
    token = (images.patch_size * images.merge_size) ** 2
    require(min_pixels >= 0 and low <= high, "min_pixels", low, f"from 0 to max_pixels, which is {high}")
    require(high >= token, "max_pixels", high, f"at least {token}, the pixels of one token")
    images.size = type(images.size)(**dict(zip(EDGES, (low, high), strict=True)))
    # pictures of the last call are remembered at their old size
    processor.__dict__.pop("_last_pictures", None)


def _limited(processor):
    """The image processor, if it has the pixel limits of Qwen-VL."""
    images = None if tokenizer_of(processor) is processor else processor.image_processor
    if images is None or not all((images.to_dict().get("size") or {}).get(edge) for edge in EDGES):
        raise ValueError(
            f"{type(images or processor).__name__} has no limits {' and '.join(EDGES)} in pixels, as Qwen-VL's image "
            "processors do; leave min_pixels, max_pixels and max_prompt_length at 0, or use a Qwen-VL policy."
        )
    return images
