#!/usr/bin/env python3
"""Bring what the crawler delivered into data_factory: samples, their texts, and what changed about them.

Lines are read, checked and compared in batches; while the server applies one batch, the next is being read.
"""

import argparse
import codecs
import configparser
import functools
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, TypeVar

import psycopg
import pydantic_core
from psycopg import sql
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from typing_extensions import TypedDict

from station import cli
from station.cli import log
from station.database import Connection, Run, connect_data_factory, exclusive, recorded_run
from station.errors import ExitCode, PersonNeededError, SettingError, UnavailableError, UsageError
from station.settings import load_settings

METADATA = "metadata.jsonl"
BATCH_LINES = 10_000
BATCH_BYTES = 16 * 2**20
LONGEST_LINE_BYTES = 2**20
READ_AT_ONCE_BYTES = 4 * 2**20
MOST_REPORTED = 1_000
FEW_SAMPLES = 20


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = cli.parser(
        "Read a corpus (metadata.jsonl, audio/, text/) into data_factory. What did not change is left alone; changed\n"
        "audio, transcripts and translations raise a sample's version. Lines that are wrong are reported and left out."
    )
    options.add_argument("corpus", nargs="?", type=Path, metavar="CORPUS", help="folder (default: RAW_DIR)")
    cli.add_dry_run(options)
    options.add_argument(
        "--remove-missing", action="store_true", help="mark samples that the corpus no longer has as removed"
    )
    options.add_argument(
        "--even-most",
        action="store_true",
        help="with --remove-missing: even if more than half of all samples would go",
    )
    return options


def main(options: argparse.Namespace) -> ExitCode:
    """Ingest one corpus."""
    settings = load_settings(options.env_file)
    folder = options.corpus or settings.raw_dir
    if not (folder / METADATA).is_file():
        if options.corpus:
            raise UsageError(f"{folder} is not a corpus: it has no file {METADATA}")
        raise SettingError(f"RAW_DIR: {folder} has no file {METADATA}: name the corpus, or get it with `dvc pull`")
    corpus = Corpus(folder)
    try:
        with ExitStack() as stack:
            connection = stack.enter_context(connect_data_factory(settings, "ingest"))
            writer = stack.enter_context(connect_data_factory(settings, "ingest"))
            stack.enter_context(exclusive(connection, "ingest"))
            run = None if options.dry_run else stack.enter_context(recorded_run(connection, "ingest"))
            return _ingest(options, corpus, connection, writer, run)
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[0]
        raise UnavailableError(f"the ingest was interrupted: {reason}; run it again, it goes on where it was") from None


def _ingest(
    options: argparse.Namespace, corpus: "Corpus", connection: Connection, writer: Connection, run: Run | None
) -> ExitCode:
    origin = Origin(corpus.git_revision(), corpus.dvc_revision(), run.run_id if run else None)
    if run:
        record_origin(connection, origin)
    rejections = Rejections()
    counts: Counter[str] = Counter()
    prepare_reading(connection)
    prepare_writing(writer)
    with ThreadPoolExecutor(1) as pool:
        applying: Future[Counter[str]] | None = None
        for batch in read_batches(connection, corpus, rejections, counts):
            if applying:
                counts += applying.result()
            applying = pool.submit(apply_batch, writer, batch, origin, dry_run=options.dry_run)
        if applying:
            counts += applying.result()

    removed, refusal = 0, ""
    if options.remove_missing and rejections.without_id:
        log.error(
            "no sample was removed: the ids of %d rejected lines cannot be read, so what is missing is not known",
            rejections.without_id,
        )
    elif options.remove_missing:
        missing, present = count_missing(connection)
        if missing >= FEW_SAMPLES and missing > present / 2 and not options.even_most:
            refusal = (
                f"{missing} of {present} samples are missing from {corpus.metadata} and were not removed: look whether "
                "the corpus is complete; if it is, run again with --remove-missing --even-most"
            )
        else:
            removed = missing if options.dry_run else remove_missing(connection, origin)

    result: dict[str, object] = {
        "dry_run": options.dry_run,
        "added": counts["added"],
        "changed": counts["changed"],
        "changed_audio": counts["audio"],
        "changed_transcript": counts["transcript"],
        "changed_translation": counts["translation"],
        "changed_metadata_only": counts["metadata"],
        "unchanged": counts["unchanged"],
        "removed": removed,
        "returned": counts["returned"],
        "rejected": rejections.count,
    }
    code = ExitCode.PARTIAL if rejections.count else ExitCode.DONE
    if run:
        run.counts.update(result, exit_code=code)
    cli.print_result(
        options,
        result,
        [
            f"{'would be: ' if options.dry_run else ''}added {counts['added']}, changed {counts['changed']}, "
            f"unchanged {counts['unchanged']}, removed {removed}, returned {counts['returned']}, "
            f"rejected {rejections.count}",
            f"of what changed: audio {counts['audio']}, transcript {counts['transcript']}, "
            f"translation {counts['translation']}, metadata only {counts['metadata']}",
        ],
    )
    if refusal:
        raise PersonNeededError(refusal)
    return code


# --- What a line and a text file must be ---


def _calendar_date(value: str) -> str:
    date.fromisoformat(value)
    return value


def _hyphenated(value: object) -> object:
    # yt-dlp writes upload dates without hyphens.
    if isinstance(value, str) and re.fullmatch(r"[0-9]{8}", value):
        return f"{value[:4]}-{value[4:6]}-{value[6:]}"
    return value


def _external_id(value: str) -> str:
    if re.search(r"#conflict-[0-9]+$", value):
        raise ValueError("ends as the id of a sample made by create_conflict_sample")
    return value


ExternalId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$"),
    AfterValidator(_external_id),
]
CalendarDate = Annotated[str, StringConstraints(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_calendar_date)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
PATH_FIELDS = ("file_path", "transcript_file", "translation_file")


class Line(BaseModel):
    """One line of metadata.jsonl. Unknown fields are kept as the sample's metadata."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    id: ExternalId
    type: Literal["youtube_with_transcript", "youtube_without_transcript", "substack", "manual_upload"]
    file_path: NonEmpty | None = None
    duration: Annotated[float, Field(gt=0)] | None = None
    language_tags: Annotated[list[NonEmpty], Field(min_length=1)]
    captured_at: CalendarDate
    url: str | None = None
    title: str | None = None
    channel_id: str | None = None
    upload_date: Annotated[CalendarDate, BeforeValidator(_hyphenated)] | None = None
    acoustic_meta: dict[str, Any] | None = None
    transcript_file: NonEmpty | None = None
    translation_file: NonEmpty | None = None
    subtitle_type: str | None = None
    transcript_language: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cs_ratio: float | None = None


class Segment(TypedDict):
    """A part of a text; times in seconds."""

    text: str
    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)]


class TextFile(BaseModel):
    """A transcript or a translation."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    full_text: str | None = None
    segments: list[Segment] | None = None
    language: str | None = None
    target_language: str | None = None


class LineId(BaseModel):
    """What is left of a line that is wrong."""

    model_config = ConfigDict(strict=True)

    id: ExternalId


Document = TypeVar("Document", Line, LineId, TextFile)


class RejectedError(Exception):
    """A line that cannot be taken; its text is `field: reason`."""


def parse(model: type[Document], raw: bytes) -> Document:
    """Read JSON into a model, its texts normalised to NFC.

    Raises:
        RejectedError: it is not what the model says.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise RejectedError(f"line: not UTF-8 from byte {error.start + 1} on") from None
    try:
        # Every part of a normalised text is normalised, unless it is written with escapes.
        if "\\u" in text or not unicodedata.is_normalized("NFC", text):
            values = pydantic_core.from_json(text)
            if isinstance(values, dict):
                values = {name: _normalised(name, value) for name, value in values.items()}
            return model.model_validate_json(pydantic_core.to_json(values, inf_nan_mode="constants"))
        return model.model_validate_json(text)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'line'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        more = [f"and {len(faults) - 3} more"] if len(faults) > 3 else []
        raise RejectedError("; ".join(faults[:3] + more)) from None
    except ValueError as error:
        raise RejectedError(f"line: Invalid JSON: {error}") from None


def _normalised(name: str, value: Any) -> Any:
    """A value of a top-level field in NFC.

    Paths stay as they are: a file's name is bytes, and its normalised form would be another file's name.
    """
    match value:
        case str():
            if "\0" in value:
                raise RejectedError(f"{name}: holds a NUL character")
            return value if name in PATH_FIELDS else unicodedata.normalize("NFC", value)
        case list():
            return [_normalised(name, item) for item in value]
        case dict():
            return {_normalised(name, key): _normalised(name, item) for key, item in value.items()}
        case _:
            return value


# --- The corpus on disk ---


class Corpus:
    """A delivered folder, and what may be read of it."""

    def __init__(self, folder: Path) -> None:
        """Find the folder and the repository around it."""
        self.folder = folder.resolve()
        self.metadata = self.folder / METADATA
        around = [self.folder, *self.folder.parents]
        self.repository = next((parent for parent in around if (parent / ".git").exists()), None)
        dvc = next((parent for parent in around if (parent / ".dvc").is_dir()), None)
        # DVC may link a file into its cache instead of copying it.
        homes = [self.folder] + ([_dvc_cache(dvc / ".dvc").resolve()] if dvc else [])
        self._homes = tuple(f"{home}/" for home in homes)
        self._real_folder = functools.lru_cache(maxsize=1_000)(self._find_folder)

    def find(self, name: str, path: str) -> tuple[str, os.stat_result]:
        """The file that field `name` of a line names: where it really is, and its status.

        Raises:
            RejectedError: there is none, or it lies elsewhere.
        """
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise RejectedError(f"{name}: {path!r} is not a plain path below the corpus")
        parent, _, leaf = path.rpartition("/")
        try:
            real = f"{self._real_folder(parent)}/{leaf}"
            status = os.lstat(real)
            if stat.S_ISLNK(status.st_mode):
                real = self._at_home(os.path.realpath(real))
                status = os.lstat(real)
        except FileNotFoundError:
            raise RejectedError(f"{name}: there is no file {path!r}") from None
        except OSError as error:
            raise RejectedError(f"{name}: {path!r} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise RejectedError(f"{name}: {path!r} is not a file")
        return real, status

    def _find_folder(self, folder: str) -> str:
        return self._at_home(os.path.realpath(self.folder / folder))

    def _at_home(self, real: str) -> str:
        if not f"{real}/".startswith(self._homes):
            raise OSError(0, "a link leads out of the corpus")
        return real

    def git_revision(self) -> str | None:
        """The commit that is checked out in the repository around the corpus."""
        if self.repository is None:
            return None
        try:
            done = subprocess.run(
                ["git", "-C", str(self.repository), "rev-parse", "--verify", "HEAD"],
                capture_output=True, text=True, check=False, timeout=30,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("the commit of %s is not recorded: %s", self.repository, error)
            return None
        if done.returncode != 0:
            log.warning("the commit of %s is not recorded: %s", self.repository, done.stderr.strip().splitlines()[-1])
            return None
        return done.stdout.strip()

    def dvc_revision(self) -> str | None:
        """The md5 that DVC gives the corpus: from `<corpus>.dvc`, else from a dvc.lock around it."""
        pointer = self.folder.with_name(f"{self.folder.name}.dvc")
        if pointer.is_file():
            return _dvc_output(pointer, self.folder.name)
        for parent in self.folder.parents:
            lock = parent / "dvc.lock"
            if lock.is_file():
                return _dvc_output(lock, self.folder.relative_to(parent).as_posix())
        return None


def _dvc_cache(dvc: Path) -> Path:
    """Where DVC keeps its files: beside its settings, unless they name a place, such as one that a lab shares.

    Args:
        dvc: a repository's `.dvc` folder.

    Raises:
        SettingError: its settings cannot be read.
    """
    cache = dvc / "cache"
    # As DVC itself: the later the nearer. A relative path counts from the folder of its file.
    for file in (Path("/etc/xdg/dvc/config"), dvc / "config", dvc / "config.local"):
        settings = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            settings.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise SettingError(f"{file} cannot be read: {error}") from None
        if named := settings.get("cache", "dir", fallback="").strip("\"'"):
            cache = file.parent / named
    return cache


def _dvc_output(file: Path, path: str) -> str | None:
    """The md5 of one output in a file that DVC wrote: YAML of one known shape, lists of `name: value`."""
    section = ""
    entry: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.strip().removeprefix("- ").partition(":")
        if value == "":
            section = name
        if value == "" or line.lstrip().startswith("- "):
            entry = {}
        entry[name] = value.strip()
        if section == "outs" and entry.get("path") == path and "md5" in entry:
            return entry["md5"]
    return None


# --- Reading: lines → what has to be written ---


class Rejections:
    """What was left out, and why: reported batch by batch in the order of the lines."""

    def __init__(self) -> None:
        """Start with none."""
        self.count = 0
        self.without_id = 0
        self._waiting: list[tuple[int, str]] = []

    def add(self, number: int, reason: str, external_id: str | None) -> None:
        """Note a line's rejection."""
        self.count += 1
        self.without_id += external_id is None
        if self.count <= MOST_REPORTED:
            self._waiting.append((number, f"{reason} (id {external_id})" if external_id else reason))

    def report(self) -> None:
        """Report what was noted since the last report."""
        for number, reason in sorted(self._waiting):
            log.error("%s:%d: %s", METADATA, number, reason)
        self._waiting.clear()

    def finish(self) -> None:
        """Say how many were not reported one by one."""
        if self.count > MOST_REPORTED:
            log.error("%s: and %d more lines were rejected", METADATA, self.count - MOST_REPORTED)


class NumberedLine(NamedTuple):
    """A line and its place. `line` is None if it was rejected, `external_id` if that cannot be read."""

    number: int
    external_id: str | None
    line: Line | None
    md5: str


class Known(NamedTuple):
    """What data_factory holds of a sample."""

    sample_id: str
    audio_path: str | None
    audio_file_md5: str | None
    audio_size_bytes: int | None
    audio_modified_ns: int | None
    transcript_md5: str | None
    translation_md5: str | None
    delivery_md5: str | None
    removed: bool


class Audio(NamedTuple):
    """An audio file."""

    md5: str | None = None
    size_bytes: int | None = None
    modified_ns: int | None = None


class Text(NamedTuple):
    """A text file. Without `text` it is as data_factory knows it."""

    md5: str | None = None
    text: str | None = None
    segments: str | None = None
    language: str | None = None


Row = tuple[object, ...]


def prepare_reading(connection: Connection) -> None:
    """Make the table of the ids that this file has named: memory must not grow with the file."""
    connection.execute("SET temp_buffers = '64MB'")
    connection.execute("CREATE TEMP TABLE seen (external_id text PRIMARY KEY, line integer NOT NULL)")


def read_batches(
    connection: Connection, corpus: Corpus, rejections: Rejections, counts: Counter[str]
) -> Iterator[list[Row]]:
    """Read the corpus; lines that changed nothing are only counted.

    Yields:
        rows for `apply_batch`, in the order of the lines.
    """
    batch: list[Row] = []
    batch_bytes = 0
    for lines in _read_lines(corpus.metadata, rejections):
        known, repeated = _look_up(connection, lines, rejections)
        for number, external_id, line, line_md5 in lines:
            if line is None or external_id is None or number in repeated:
                continue
            try:
                row = _row_of(corpus, number, line, line_md5, known.get(external_id))
            except RejectedError as error:
                rejections.add(number, str(error), external_id)
                continue
            if row is None:
                counts["unchanged"] += 1
                continue
            batch.append(row)
            batch_bytes += sum(len(value) for value in row if isinstance(value, str))
            if len(batch) >= BATCH_LINES or batch_bytes >= BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
        rejections.report()
    rejections.finish()
    if batch:
        yield batch


def _read_lines(metadata: Path, rejections: Rejections) -> Iterator[list[NumberedLine]]:
    lines: list[NumberedLine] = []
    read_bytes = batch_began = 0
    with metadata.open("rb") as file, cli.progress("ingest", metadata.stat().st_size) as show:
        for number, raw in enumerate(_raw_lines(file), start=1):
            read_bytes += len(raw)
            content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if not content.isspace():
                lines.append(_read_line(number, content, rejections))
            if len(lines) >= BATCH_LINES or read_bytes - batch_began >= BATCH_BYTES:
                yield lines
                show(read_bytes)
                lines, batch_began = [], read_bytes
        yield lines


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, as much as shows that it is."""
    while raw := file.readline(LONGEST_LINE_BYTES + 1):
        rest = raw
        while len(rest) > LONGEST_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE_BYTES + 1)
        yield raw


def _read_line(number: int, raw: bytes, rejections: Rejections) -> NumberedLine:
    try:
        if len(raw) > LONGEST_LINE_BYTES:
            raise RejectedError(f"line: longer than {LONGEST_LINE_BYTES} bytes")
        line = parse(Line, raw)
        if line.file_path is None and line.type != "substack":
            raise RejectedError(f"file_path: missing, and {line.type} has audio")
        if line.file_path is not None and line.duration is None:
            raise RejectedError("duration: missing, and there is audio")
    except RejectedError as error:
        external_id = _readable_id(raw)
        rejections.add(number, str(error), external_id)
        return NumberedLine(number, external_id, None, "")
    return NumberedLine(number, line.id, line, hashlib.md5(raw.strip()).hexdigest())


def _readable_id(raw: bytes) -> str | None:
    """The id of a line that is wrong in another way."""
    try:
        values = pydantic_core.from_json(raw)
        return parse(LineId, pydantic_core.to_json({"id": values["id"]})).id
    except (ValueError, TypeError, KeyError, RejectedError):
        return None


# No id holds a line break, and one long text is sent in a fraction of the time that an array takes.
_GIVEN = sql.SQL(
    """
    unnest(string_to_array(%(ids)s, E'\\n'), string_to_array(%(numbers)s, E'\\n')::integer[])
    AS given (external_id, line)
    """
)
_NOTE_SEEN = sql.SQL("INSERT INTO seen SELECT * FROM {} ON CONFLICT DO NOTHING").format(_GIVEN)
_FIND_REPEATED = sql.SQL(
    "SELECT given.line, seen.line FROM {} INNER JOIN seen USING (external_id) WHERE given.line <> seen.line"
).format(_GIVEN)
_FIND_KNOWN = """
SELECT
    external_id, sample_id::text, audio_path, audio_file_md5, audio_size_bytes, audio_modified_ns,
    transcript_md5, translation_md5, delivery_md5, removed_at IS NOT NULL
FROM samples
WHERE external_id = ANY (string_to_array(%(ids)s, E'\\n'))
"""


def _look_up(
    connection: Connection, lines: list[NumberedLine], rejections: Rejections
) -> tuple[dict[str, Known], set[int]]:
    """What data_factory knows of the lines' samples, by external id; and which lines repeat an id."""
    named = {line.number: line for line in lines if line.external_id is not None}
    names = {
        "ids": "\n".join(line.external_id or "" for line in named.values()),
        "numbers": "\n".join(map(str, named)),
    }
    added = connection.execute(_NOTE_SEEN, names).rowcount
    repeated = set()
    if added < len(named):
        for number, first in connection.execute(_FIND_REPEATED, names):
            repeated.add(number)
            if named[number].line is not None:
                rejections.add(number, f"id: repeats that of line {first}", named[number].external_id)
    with connection.transaction():
        # The cost must follow the lines, not the corpus.
        connection.execute("SET LOCAL enable_seqscan = off")
        found = connection.execute(_FIND_KNOWN, names)
        known = {external_id: Known(*values) for external_id, *values in found}
    return known, repeated


# As they are called in `samples`.
SAMPLE_COLUMNS = (
    "external_id", "source_type", "audio_path", "audio_file_md5", "audio_size_bytes", "audio_modified_ns",
    "duration_seconds", "language_tags", "captured_at", "url", "title", "channel_id", "upload_date", "acoustic_meta",
    "subtitle_type", "transcript_language", "priority", "cs_ratio", "metadata", "transcript_md5", "translation_md5",
    "delivery_md5",
)  # fmt: skip
# What else `_row_of` gives. A sample that is already there gets its outcome, version and kinds under its row lock.
OTHER_COLUMNS = {
    "line": "integer",
    "sample_id": "uuid",
    "outcome": "text",
    "sync_version": "integer",
    "kinds": "change_kind[]",
    "transcript": "text",
    "transcript_segments": "jsonb",
    "transcript_text_language": "text",
    "translation": "text",
    "translation_segments": "jsonb",
    "translation_text_language": "text",
}


def _row_of(corpus: Corpus, number: int, line: Line, line_md5: str, known: Known | None) -> Row | None:
    """What to write for a line; None if nothing changed.

    Raises:
        RejectedError: a file that the line names is missing or wrong.
    """
    audio = _read_audio(corpus, line.file_path, known)
    transcript = _read_text(corpus, "transcript_file", line.transcript_file, known and known.transcript_md5)
    translation = _read_text(corpus, "translation_file", line.translation_file, known and known.translation_md5)
    content = {"audio": audio.md5, "transcript": transcript.md5, "translation": translation.md5}
    delivery_md5 = hashlib.md5(f"{line_md5} {content}".encode()).hexdigest()
    if known is None:
        kinds = ",".join(kind for kind, md5 in content.items() if md5 is not None)
        state: Row = (_time_ordered_id(), "added", 1, f"{{{kinds}}}")
    elif (known.delivery_md5, known.audio_size_bytes, known.audio_modified_ns, known.removed) == (
        delivery_md5, audio.size_bytes, audio.modified_ns, False
    ):  # fmt: skip
        return None
    else:
        state = (known.sample_id, None, None, None)
    return (
        line.id, line.type, line.file_path, audio.md5, audio.size_bytes, audio.modified_ns,
        line.duration, line.language_tags, line.captured_at, line.url, line.title, line.channel_id, line.upload_date,
        None if line.acoustic_meta is None else _json("acoustic_meta", line.acoustic_meta),
        line.subtitle_type, line.transcript_language, line.priority or 0, line.cs_ratio,
        _json("metadata", line.model_extra or {}), transcript.md5, translation.md5, delivery_md5,
        number, *state,
        transcript.text, transcript.segments, transcript.language or line.transcript_language,
        translation.text, translation.segments, translation.language,
    )  # fmt: skip


def _time_ordered_id() -> str:
    """A version 7 UUID (RFC 9562): rows that come together lie together in every index on sample_id."""
    digits = os.urandom(10).hex()
    return f"{time.time_ns() // 1_000_000:012x}7{digits[1:4]}8{digits[5:]}"


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _json(name: str, value: object) -> str:
    try:
        return _encode_json(value)
    except ValueError:
        raise RejectedError(f"{name}: holds a number that is not finite") from None


def _content(real: str, size: int) -> bytes:
    # Without the file objects of `open`: for small files they cost more than the reading.
    descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def _read_audio(corpus: Corpus, path: str | None, known: Known | None) -> Audio:
    if path is None:
        return Audio()
    if not path.startswith("audio/"):
        raise RejectedError(f"file_path: {path!r} does not lie below audio/, the folder that the audio server serves")
    real, status = corpus.find("file_path", path)
    size, modified = status.st_size, status.st_mtime_ns
    if size == 0:
        raise RejectedError(f"file_path: {path!r} is empty")
    if known and (known.audio_path, known.audio_size_bytes, known.audio_modified_ns) == (path, size, modified):
        return Audio(known.audio_file_md5, size, modified)
    try:
        if size <= READ_AT_ONCE_BYTES:
            md5 = hashlib.md5(_content(real, size)).hexdigest()
        else:
            with io.FileIO(real) as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise RejectedError(f"file_path: {path!r} cannot be read: {error.strerror}") from None
    return Audio(md5, size, modified)


def _read_text(corpus: Corpus, name: str, path: str | None, known_md5: str | None) -> Text:
    if path is None:
        return Text()
    real, status = corpus.find(name, path)
    if status.st_size > READ_AT_ONCE_BYTES:
        raise RejectedError(f"{name}: {path!r} is longer than {READ_AT_ONCE_BYTES} bytes")
    try:
        raw = _content(real, status.st_size)
    except OSError as error:
        raise RejectedError(f"{name}: {path!r} cannot be read: {error.strerror}") from None
    md5 = hashlib.md5(raw).hexdigest()
    if md5 == known_md5:
        return Text(md5)
    try:
        document = parse(TextFile, raw.removeprefix(codecs.BOM_UTF8))
        segments = document.segments or []
        for number, segment in enumerate(segments):
            if segment["end"] < segment["start"]:
                raise RejectedError(f"segments.{number}: ends before it starts")
        text = document.full_text or ""
        if not text.strip():
            text = " ".join(segment["text"].strip() for segment in segments)
        if not text.strip():
            raise RejectedError("full_text: there is no text, nor in segments")
    except RejectedError as error:
        raise RejectedError(f"{name}: {path!r}: {error}") from None
    return Text(
        md5,
        text,
        pydantic_core.to_json(segments).decode() if segments else None,
        document.target_language or document.language,
    )


# --- Applying: one batch, one transaction ---


@dataclass(frozen=True)
class Origin:
    """Where an ingest's content comes from."""

    git_revision: str | None
    dvc_revision: str | None
    run_id: int | None


def record_origin(connection: Connection, origin: Origin) -> None:
    """Note in the run which revision it brings in."""
    connection.execute(
        "UPDATE runs SET git_revision = %s, dvc_revision = %s WHERE run_id = %s",
        [origin.git_revision, origin.dvc_revision, origin.run_id],
    )


_SAMPLE_LIST = sql.SQL(", ").join(map(sql.Identifier, SAMPLE_COLUMNS))
_COPY = sql.SQL("COPY delivery ({}, {}) FROM STDIN").format(
    _SAMPLE_LIST, sql.SQL(", ").join(map(sql.Identifier, OTHER_COLUMNS))
)

# The locks keep everyone else who numbers revisions or raises versions out until the commit. A text counts as
# changed only if it says something else than the crawler's last: a file that was merely written anew does not.
_JUDGE = """
WITH current AS MATERIALIZED (
    SELECT sample_id, sync_version, audio_file_md5, delivery_md5, removed_at
    FROM samples
    WHERE sample_id IN (SELECT sample_id FROM delivery WHERE outcome IS NULL)
    ORDER BY sample_id
    FOR NO KEY UPDATE
),
compared AS (
    SELECT
        d.ctid AS place,
        c.sync_version,
        c.delivery_md5 IS DISTINCT FROM d.delivery_md5 AS differs,
        array_remove(ARRAY[
            CASE WHEN c.removed_at IS NOT NULL THEN 'return' END,
            CASE WHEN c.audio_file_md5 IS DISTINCT FROM d.audio_file_md5 THEN 'audio' END,
            CASE WHEN (d.transcript, d.transcript_segments, d.transcript_text_language)
                IS DISTINCT FROM (r.text, r.segments, r.language) AND d.transcript IS NOT NULL THEN 'transcript' END,
            CASE WHEN (d.translation, d.translation_segments, d.translation_text_language)
                IS DISTINCT FROM (t.text, t.segments, t.language) AND d.translation IS NOT NULL THEN 'translation' END
        ]::change_kind[], NULL) AS kinds
    FROM delivery AS d
    INNER JOIN current AS c USING (sample_id)
    LEFT JOIN LATERAL (
        SELECT text, segments, language FROM revisions
        WHERE sample_id = d.sample_id AND kind = 'transcript' AND source = 'crawler' AND withdrawn_at IS NULL
        ORDER BY version DESC LIMIT 1
    ) AS r ON d.transcript IS NOT NULL
    LEFT JOIN LATERAL (
        SELECT text, segments, language FROM revisions
        WHERE sample_id = d.sample_id AND kind = 'translation' AND source = 'crawler' AND withdrawn_at IS NULL
        ORDER BY version DESC LIMIT 1
    ) AS t ON d.translation IS NOT NULL
)
UPDATE delivery AS d
SET kinds = compared.kinds,
    sync_version = compared.sync_version + (compared.kinds <> '{}')::integer,
    outcome = CASE
        WHEN 'return' = ANY (compared.kinds) THEN 'returned'
        WHEN compared.differs THEN 'changed'
        ELSE 'unchanged'
    END
FROM compared
WHERE d.ctid = compared.place
"""

_ADD_SAMPLES = sql.SQL(
    """
    INSERT INTO samples (sample_id, {columns}, dvc_commit_hash)
    SELECT sample_id, {columns}, %(git)s
    FROM delivery
    WHERE outcome = 'added'
    ORDER BY line
    """
).format(columns=_SAMPLE_LIST)

# Rows that are 'unchanged' and yet here: the audio file was touched, and need not be hashed the next time.
_UPDATE_SAMPLES = sql.SQL(
    """
    UPDATE samples AS s
    SET ({columns}) = ROW({new_values}),
        sync_version = d.sync_version,
        removed_at = NULL,
        dvc_commit_hash = CASE d.outcome WHEN 'unchanged' THEN s.dvc_commit_hash ELSE %(git)s END,
        updated_at = CASE d.outcome WHEN 'unchanged' THEN s.updated_at ELSE now() END
    FROM delivery AS d
    WHERE s.sample_id = d.sample_id AND d.outcome <> 'added'
    """
).format(
    columns=_SAMPLE_LIST,
    new_values=sql.SQL(", ").join(sql.SQL("d.{}").format(sql.Identifier(name)) for name in SAMPLE_COLUMNS),
)

_ADD_CHANGES = """
INSERT INTO sample_changes (sample_id, sync_version, kind, content_hash, dvc_revision, source, run_id)
SELECT
    d.sample_id,
    d.sync_version,
    kind,
    CASE kind
        WHEN 'audio' THEN d.audio_file_md5
        WHEN 'transcript' THEN md5(d.transcript)
        WHEN 'translation' THEN md5(d.translation)
    END,
    %(dvc)s,
    'crawler',
    %(run)s
FROM delivery AS d
CROSS JOIN unnest(d.kinds) AS kind
"""

_ADD_REVISIONS = """
INSERT INTO revisions (sample_id, kind, version, sync_version, text, segments, language, source)
SELECT
    d.sample_id,
    new.kind::revision_kind,
    CASE d.outcome
        WHEN 'added' THEN 1
        ELSE (
            SELECT coalesce(max(r.version), 0) + 1
            FROM revisions AS r
            WHERE r.sample_id = d.sample_id AND r.kind = new.kind::revision_kind
        )
    END,
    d.sync_version,
    new.text,
    new.segments,
    new.language,
    'crawler'
FROM delivery AS d
CROSS JOIN LATERAL (
    VALUES
    ('transcript', d.transcript, d.transcript_segments, d.transcript_text_language),
    ('translation', d.translation, d.translation_segments, d.translation_text_language)
) AS new (kind, text, segments, language)
WHERE new.kind::change_kind = ANY (d.kinds)
"""


def prepare_writing(connection: Connection) -> None:
    """Make the table that a batch is copied into."""
    # Batches are small beside the tables they meet: never read those whole, and compile nothing.
    connection.execute("SET enable_seqscan = off")
    connection.execute("SET enable_mergejoin = off")
    connection.execute("SET jit = off")
    connection.execute(
        sql.SQL("CREATE TEMP TABLE delivery ON COMMIT DELETE ROWS AS SELECT {}, {} FROM samples WITH NO DATA").format(
            _SAMPLE_LIST,
            sql.SQL(", ").join(
                sql.SQL("NULL::{} AS {}").format(sql.SQL(kind), sql.Identifier(name))
                for name, kind in OTHER_COLUMNS.items()
            ),
        )
    )


def apply_batch(connection: Connection, batch: list[Row], origin: Origin, *, dry_run: bool) -> Counter[str]:
    """Write one batch, or with `dry_run` only find out what would be written.

    Returns:
        how many samples were added, changed, returned or unchanged; of those that were there already, how many got
        new audio, transcript, translation, or metadata only.
    """
    values = {"git": origin.git_revision, "dvc": origin.dvc_revision, "run": origin.run_id}
    with connection.transaction(force_rollback=dry_run), connection.cursor() as cursor:
        with cursor.copy(_COPY) as copy:
            for row in batch:
                copy.write_row(row)
        cursor.execute(_JUDGE)
        cursor.execute("SELECT outcome, kinds::text[], count(*) FROM delivery GROUP BY outcome, kinds")
        counts = _counts_of(cursor.fetchall())
        if not dry_run:
            for statement in (_ADD_SAMPLES, _UPDATE_SAMPLES, _ADD_CHANGES, _ADD_REVISIONS):
                cursor.execute(statement, values)
    return counts


def _counts_of(outcomes: list[tuple[Any, ...]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for outcome, kinds, count in outcomes:
        counts[outcome] += count
        if outcome == "changed" and not kinds:
            counts["metadata"] += count
        if outcome != "added":
            counts.update(dict.fromkeys(kinds, count))
    return counts


# --- Removing what is no longer delivered ---


def count_missing(connection: Connection) -> tuple[int, int]:
    """How many samples the file did not name, and how many there are; copies made for conflicts do not count."""
    row = connection.execute(
        """
        SELECT count(*) - count(seen.external_id), count(*)
        FROM samples
        LEFT JOIN seen USING (external_id)
        WHERE parent_sample_id IS NULL AND removed_at IS NULL
        """
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def remove_missing(connection: Connection, origin: Origin) -> int:
    """Mark the samples that the file did not name as removed; returns how many."""
    return connection.execute(
        """
        WITH missing AS MATERIALIZED (
            SELECT s.sample_id
            FROM samples AS s
            LEFT JOIN seen USING (external_id)
            WHERE s.parent_sample_id IS NULL AND s.removed_at IS NULL AND seen.external_id IS NULL
            ORDER BY s.sample_id
            FOR NO KEY UPDATE OF s
        ),
        removed AS (
            UPDATE samples AS s
            SET removed_at = clock_timestamp(), updated_at = now(), sync_version = s.sync_version + 1
            FROM missing
            WHERE s.sample_id = missing.sample_id
            RETURNING s.sample_id, s.sync_version
        )
        INSERT INTO sample_changes (sample_id, sync_version, kind, dvc_revision, source, run_id)
        SELECT sample_id, sync_version, 'removal', %s, 'crawler', %s
        FROM removed
        """,
        [origin.dvc_revision, origin.run_id],
    ).rowcount


if __name__ == "__main__":
    cli.run(parser(), main)
