#!/usr/bin/env python3
"""Make the sample corpus: speak sentences.toml and write it as the crawler would deliver it.

The clips are spoken by espeak-ng. Where a sentence changes its language, each stretch is spoken by a voice of
that language, so the places where the language changes are known to the millisecond. Over half of the
transcripts get the mistakes that a speech recogniser makes, and some translations those of a translation
machine; the truth is written beside the corpus, for the simulated annotators.

The same seed and the same espeak-ng version give the same bytes. Exit codes: 0 done, 2 wrong usage,
78 something is missing or wrong (espeak-ng, one of its voices, sentences.toml, the output folder).
"""

from __future__ import annotations

import argparse
import array
import json
import math
import operator
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import unicodedata
import wave
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

EXIT_CONFIG = 78

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "sentences.toml"
DEFAULT_SEED = 20260

RATE = 16000
"""Samples per second of the clips, as the crawler delivers them."""

LOUDNESS = 60
"""espeak-ng's amplitude: its own 100 drives some voices into clipping."""

QUIET = 200
"""Samples below this amplitude at the edges of a stretch are cut off (full scale is 32767)."""

MARKUP = re.compile(
    r"\[(?P<english>[^\]]*)\]"
    r"|<(?P<pause>silence|noise) (?P<seconds>[\d.]+)>"
    r"|(?P<group>[{}])"
    r"|(?P<plain>[^\[\]{}<>]+)"
)
TONE_MARKS = frozenset("\u0300\u0301\u0303\u0309\u0323")
TYPES = ("youtube_with_transcript", "youtube_without_transcript", "substack", "manual_upload")
ERRORS = ("heard", "tones", "join", "drop", "flat")
VIETNAMESE, ENGLISH, SWITCHED, SILENCE, NOISE = "Vietnamese", "English", "Code-Switched", "Silence", "Noise"


Row = dict[str, Any]
"""One line of a .jsonl file."""


class ConfigError(Exception):
    """Something the caller has to put right before the corpus can be made; its text is one line."""


@dataclass(frozen=True)
class Stretch:
    """A piece of a line: words in one language, or a pause.

    Attributes:
        text: The words; empty for a pause.
        language: ``vi`` or ``en``; empty for a pause.
        label: What a perfect annotator would call it.
        seconds: Length of a pause; 0 for words.
    """

    text: str
    language: str
    label: str
    seconds: float = 0.0


@dataclass
class Audio:
    """What was spoken: the samples, the labelled spans, and where each line begins and ends (in samples)."""

    samples: array.array[int] = field(default_factory=lambda: array.array("h"))
    spans: list[tuple[int, int, str]] = field(default_factory=list)
    lines: list[tuple[int, int]] = field(default_factory=list)


# ------------------------------------------------------------------ reading


def nfc(value: Any) -> Any:
    """Return the value with every string in it in Unicode NFC."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [nfc(item) for item in value]
    if isinstance(value, dict):
        return {nfc(key): nfc(item) for key, item in value.items()}
    return value


def parse_line(line: str, base: str) -> list[Stretch]:
    """Split one line of speech into stretches; ``base`` is the language outside of brackets."""
    stretches: list[Stretch] = []
    grouped = False
    position = 0
    while position < len(line):
        match = MARKUP.match(line, position)
        if match is None:
            raise ConfigError(f"stray {line[position]!r} in {line!r}")
        position = match.end()
        if match["group"]:
            grouped = match["group"] == "{"
        elif match["pause"]:
            label = SILENCE if match["pause"] == "silence" else NOISE
            stretches.append(Stretch("", "", label, float(match["seconds"])))
        else:
            english = match["english"] is not None
            language = "en" if english else base
            label = SWITCHED if grouped else ENGLISH if language == "en" else VIETNAMESE
            text = (match["english"] if english else match["plain"]) or ""
            if any(char.isalnum() for char in text):
                stretches.append(Stretch(text, language, label))
    return stretches


def plain(line: str) -> str:
    """Return a line without its markup."""
    return " ".join(re.sub(r"<[^>]*>|[\[\]{}]", "", line).split())


def check_clip(clip: dict[str, Any], speakers: dict[str, dict[str, Any]]) -> None:
    """Raise ConfigError when a clip of sentences.toml cannot be made."""
    for key in ("id", "type", "language", "speech", "translation"):
        if key not in clip:
            raise ConfigError(f"{key} is missing")
    if clip["type"] not in TYPES:
        raise ConfigError(f"type {clip['type']!r} is none of {', '.join(TYPES)}")
    if clip["type"] != "substack" and clip.get("speaker") not in speakers:
        raise ConfigError(f"speaker {clip.get('speaker')!r} is none of {', '.join(speakers)}")
    for key in ("translation", "machine_translation"):
        if key in clip and len(clip[key]) != len(clip["speech"]):
            raise ConfigError(f"{key} has {len(clip[key])} lines, speech has {len(clip['speech'])}")
    if wrong := set(clip.get("errors", [])) - set(ERRORS):
        raise ConfigError(f"errors {', '.join(sorted(wrong))} are none of {', '.join(ERRORS)}")


def read_sentences() -> dict[str, Any]:
    """Return sentences.toml, checked: ``clip`` (a list), ``speaker`` (by name), ``heard`` (tables)."""
    try:
        data: dict[str, Any] = nfc(tomllib.loads(SENTENCES.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{SENTENCES}: {error}") from error
    data["speaker"] = {speaker["name"]: speaker for speaker in data["speaker"]}
    seen: set[str] = set()
    for clip in data["clip"]:
        try:
            check_clip(clip, data["speaker"])
            for line in clip["speech"]:
                parse_line(line, clip["language"])
            if clip["id"] in seen:
                raise ConfigError("this id is used twice")
        except ConfigError as error:
            raise ConfigError(f"{SENTENCES}: clip {clip.get('id', '?')}: {error}") from error
        seen.add(clip["id"])
    return data


# -------------------------------------------------------------------- sound


def resampler(source: int, target: int = RATE, zeros: int = 16) -> tuple[int, int, list[list[int]]]:
    """Return (up, down, filters) of a windowed-sinc resampler; coefficients are whole, scaled by 2**15.

    Whole numbers, because sums of floats differ between Python versions and the clips may not. Output sample
    n stands at input position ``n * down / up``; its filter is ``filters[n * down % up]``, centred there.
    """
    common = math.gcd(source, target)
    up, down = target // common, source // common
    cutoff = 0.94 * min(1.0, target / source)
    half = math.ceil(zeros / cutoff)
    filters = []
    for phase in range(up):
        taps = []
        for tap in range(-half + 1, half + 1):
            x = tap - phase / up
            window = 0.5 + 0.5 * math.cos(math.pi * x / half) if abs(x) < half else 0.0
            sinc = 1.0 if x == 0 else math.sin(math.pi * cutoff * x) / (math.pi * cutoff * x)
            taps.append(round(cutoff * sinc * window * 32768))
        filters.append(taps)
    return up, down, filters


def resample(samples: array.array[int], source: int) -> array.array[int]:
    """Return 16-bit mono samples, taken at ``source`` per second, at ``RATE`` per second."""
    if source == RATE:
        return samples
    up, down, filters = resampler(source)
    taps = len(filters[0])
    padded = [0] * (taps // 2 - 1) + samples.tolist() + [0] * taps
    out = array.array("h")
    for n in range(len(samples) * up // down):
        start, phase = divmod(n * down, up)
        value = sum(map(operator.mul, filters[phase], padded[start : start + taps])) + 16384 >> 15
        out.append(max(-32768, min(32767, value)))
    return out


def speak(text: str, voice: str, speaker: dict[str, Any]) -> array.array[int]:
    """Return the text as espeak-ng speaks it, without the silence around it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        manner = [
            "-a",
            str(LOUDNESS),
            "-v",
            voice,
            "-s",
            str(speaker["words_per_minute"]),
            "-p",
            str(speaker["pitch"]),
        ]
        command = ["espeak-ng", *manner, "-w", str(path), "--", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode or not path.exists():
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise ConfigError(f"espeak-ng cannot speak with the voice {voice}: {reason}")
        with wave.open(str(path), "rb") as reader:
            rate = reader.getframerate()
            samples = array.array("h", reader.readframes(reader.getnframes()))
    if sys.byteorder == "big":
        samples.byteswap()
    loud = [index for index, value in enumerate(samples) if abs(value) > QUIET]
    if not loud:
        raise ConfigError(f"espeak-ng said nothing for {text!r} with the voice {voice}")
    edge = rate // 100
    return fade(resample(samples[max(0, loud[0] - edge) : loud[-1] + edge], rate))


def fade(samples: array.array[int]) -> array.array[int]:
    """Return the samples with 5 ms ramps at both ends, so that joining them does not click."""
    ramp = min(RATE // 200, len(samples) // 2)
    for index in range(ramp):
        samples[index] = samples[index] * index // ramp
        samples[-1 - index] = samples[-1 - index] * index // ramp
    return samples


def noise(count: int, rng: random.Random) -> array.array[int]:
    """Return a burst of low rumbling noise."""
    out = array.array("h")
    level = 0
    for _ in range(count):
        level = (level * 7 + int((rng.random() * 2 - 1) * 12000)) // 8
        out.append(max(-32768, min(32767, level)))
    return fade(out)


def silence(count: int) -> array.array[int]:
    """Return that many samples of silence."""
    return array.array("h", bytes(2 * count))


def voice_clip(clip: dict[str, Any], speaker: dict[str, Any], rng: random.Random) -> Audio:
    """Speak one clip. Short gaps belong to the speech around them; only written pauses are labelled."""
    audio = Audio(samples=silence(round(RATE * (0.12 + 0.1 * rng.random()))))
    for line in clip["speech"]:
        spoken: list[tuple[int, int]] = []
        for stretch in parse_line(line, clip["language"]):
            if stretch.seconds:
                count = round(RATE * stretch.seconds)
                piece = silence(count) if stretch.label == SILENCE else noise(count, rng)
            else:
                piece = speak(stretch.text.strip(" ,.;:"), speaker[stretch.language], speaker)
            start = len(audio.samples)
            audio.samples.extend(piece)
            audio.spans.append((start, len(audio.samples), stretch.label))
            if not stretch.seconds:
                spoken.append((start, len(audio.samples)))
            audio.samples.extend(silence(round(RATE * (0.03 + 0.04 * rng.random()))))
        audio.lines.append((spoken[0][0], spoken[-1][1]))
        audio.samples.extend(silence(round(RATE * (0.12 + 0.08 * rng.random()))))
    return audio


def true_segments(spans: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """Return the spans in seconds: neighbours of one label are one, others meet in the middle of the gap."""
    merged: list[tuple[int, int, str]] = []
    for start, end, label in spans:
        if merged and merged[-1][2] == label:
            merged[-1] = (merged[-1][0], end, label)
        else:
            merged.append((start, end, label))
    between = [(before[1] + after[0]) // 2 for before, after in pairwise(merged)]
    borders = [merged[0][0], *between, merged[-1][1]]
    return [
        {"start": round(start / RATE, 3), "end": round(end / RATE, 3), "label": label}
        for (start, end), (_, _, label) in zip(pairwise(borders), merged, strict=True)
    ]


# ------------------------------------------------------------------ mishearing


def pick(count: int, of: int, rng: random.Random) -> set[int]:
    """Return ``count`` different numbers below ``of`` (fewer when there are not so many)."""
    ranked = sorted(range(of), key=lambda _: rng.random())
    return set(ranked[:count])


def mishear_words(text: str, table: dict[str, str], share: float, rng: random.Random) -> str:
    """Return the text with about that share of the table's words replaced; the first one found always is."""
    words = sorted(table, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(" + "|".join(map(re.escape, words)) + r")(?!\w)", re.IGNORECASE)
    first = True

    def replace(match: re.Match[str]) -> str:
        nonlocal first
        wrong = table[match[0].lower()] if first or rng.random() < share else match[0]
        first = False
        return wrong

    return pattern.sub(replace, text)


def without_tones(word: str) -> str:
    """Return a Vietnamese word without its tone mark; marks that make another vowel stay (ấ, â)."""
    kept = (char for char in unicodedata.normalize("NFD", word) if char not in TONE_MARKS)
    return unicodedata.normalize("NFC", "".join(kept))


def lose_tones(words: list[str], rng: random.Random) -> None:
    """Take the tone marks from two words."""
    toned = [index for index, word in enumerate(words) if without_tones(word) != word]
    for index in pick(2, len(toned), rng):
        words[toned[index]] = without_tones(words[toned[index]])


def drop_word(words: list[str], rng: random.Random) -> None:
    """Take out one word that is neither the first nor the last."""
    for index in pick(1, len(words) - 2, rng):
        del words[index + 1]


def join_words(words: list[str], rng: random.Random) -> None:
    """Write two neighbouring words as one."""
    joints = [index for index, (a, b) in enumerate(pairwise(words)) if a.isalpha() and b.isalpha()]
    for joint in [joints[index] for index in pick(1, len(joints), rng)]:
        words[joint : joint + 2] = [words[joint] + words[joint + 1]]


def mishear(line: str, clip: dict[str, Any], heard: dict[str, dict[str, str]], rng: random.Random) -> str:
    """Return a line as a speech recogniser would have written it, with the clip's kinds of errors."""
    kinds = clip.get("errors", [])
    text = plain(line)
    if "heard" in kinds:
        for table in ("en",) if clip["language"] == "en" else ("switched", "vi"):
            text = mishear_words(text, heard[table], 0.6, rng)
    words = text.split()
    for kind, spoil in (("tones", lose_tones), ("drop", drop_word), ("join", join_words)):
        if kind in kinds:
            spoil(words, rng)
    text = " ".join(words)
    return " ".join(re.sub(r"[^\w\s'-]", " ", text.lower()).split()) if "flat" in kinds else text


# -------------------------------------------------------------------- writing


def text_file(lines: list[str], audio: Audio | None, language: str, subtitle_type: str) -> dict[str, Any]:
    """Return the content of a transcript file; a text without audio has no segments, for it has no times."""
    segments = []
    if audio is not None:
        for text, (start, end) in zip(lines, audio.lines, strict=True):
            segments.append({"text": text, "start": round(start / RATE, 2), "end": round(end / RATE, 2)})
    full_text = " ".join(lines)
    return {
        "language": language,
        "subtitle_type": subtitle_type,
        "segments": segments,
        "full_text": full_text,
    }


def cs_ratio(clip: dict[str, Any]) -> float:
    """Return the share of words that are not in the clip's own language."""
    stretches = [stretch for line in clip["speech"] for stretch in parse_line(line, clip["language"])]
    foreign = sum(len(s.text.split()) for s in stretches if s.language and s.language != clip["language"])
    return round(foreign / sum(len(s.text.split()) for s in stretches), 3)


def slug(text: str) -> str:
    """Return the text as lower-case ASCII words with hyphens between them."""
    letters = unicodedata.normalize("NFD", text.lower().replace("đ", "d")).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", letters))


def provenance(clip: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Return where the clip claims to come from. The addresses use a reserved name and lead nowhere."""
    uploaded = date(2025, 9, 1) + timedelta(days=int(rng.random() * 60))
    captured = uploaded + timedelta(days=1 + int(rng.random() * 20))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    video = "".join(letters[int(rng.random() * len(letters))] for _ in range(11))
    out: dict[str, Any] = {"captured_at": captured.isoformat()}
    if clip["type"].startswith("youtube"):
        out |= {
            "url": f"https://video.example/watch?v={video}",
            "channel_id": slug(clip["title"].split(",")[0]),
        }
    elif clip["type"] == "substack":
        out["url"] = f"https://newsletter.example/p/{clip['id']}"
    if "url" in out:
        out |= {"title": clip["title"], "upload_date": uploaded.isoformat()}
    return out


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file for people to read."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_wav(path: Path, samples: array.array[int]) -> None:
    """Write 16-bit mono PCM."""
    if sys.byteorder == "big":
        samples = array.array("h", samples)
        samples.byteswap()
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(samples.tobytes())


def make_clip(clip: dict[str, Any], data: dict[str, Any], seed: int, corpus: Path) -> tuple[Row, Row]:
    """Write the files of one clip below ``corpus``; return its lines of metadata.jsonl and of truth.jsonl.

    Sound, text and provenance each draw their own random numbers: changing one leaves the others alone.
    """
    name, language = clip["id"], clip["language"]
    other = "vi" if language == "en" else "en"
    lines = [plain(line) for line in clip["speech"]]
    audio = None
    ratio = cs_ratio(clip)
    meta: dict[str, Any] = {"id": name, "type": clip["type"]}
    if clip["type"] != "substack":
        audio = voice_clip(clip, data["speaker"][clip["speaker"]], random.Random(f"{seed}:{name}:sound"))
        meta |= {"file_path": f"audio/{name}.wav", "duration": round(len(audio.samples) / RATE, 3)}
        write_wav(corpus / meta["file_path"], audio.samples)
    meta["language_tags"] = [language, other] if ratio else [language]
    meta |= provenance(clip, random.Random(f"{seed}:{name}:provenance"))
    if audio is not None:
        meta["acoustic_meta"] = {"sample_rate": RATE, "channels": 1, "format": "wav"}
    if clip["type"] != "youtube_without_transcript":
        rng = random.Random(f"{seed}:{name}:text")
        subtitle_type = "auto" if clip.get("errors") else "manual"
        heard = [mishear(line, clip, data["heard"], rng) for line in clip["speech"]]
        transcript = text_file(heard, audio, language, subtitle_type)
        meta |= {"transcript_file": f"text/{name}.transcript.json", "transcript_language": language}
        meta["subtitle_type"] = subtitle_type
        write_json(corpus / meta["transcript_file"], transcript)
        if subtitle_type == "auto":
            meta["asr"] = {"engine": "demo-asr", "confidence": round(0.55 + 0.35 * rng.random(), 2)}
        if clip.get("has_translation", True):
            delivered = clip.get("machine_translation", clip["translation"])
            translation = text_file(delivered, audio, language, subtitle_type)
            meta["translation_file"] = f"text/{name}.translation.json"
            write_json(corpus / meta["translation_file"], {**translation, "target_language": other})
    meta["cs_ratio"] = ratio
    if "priority" in clip:
        meta["priority"] = clip["priority"]
    meta |= clip.get("extra", {})
    truth = {
        "id": name,
        "transcript": " ".join(lines),
        "translation": " ".join(clip["translation"]),
        "segments": true_segments(audio.spans) if audio else [],
    }
    return meta, truth


def put_in_place(built: Path, output: Path) -> None:
    """Replace ``output``'s corpus and truth by the ones built; until then the old ones stay whole."""
    corpus = output / "corpus"
    if corpus.exists():
        corpus.rename(built / "replaced")
    (built / "corpus").rename(corpus)
    (built / "truth.jsonl").replace(output / "truth.jsonl")


def refuse_foreign(corpus: Path) -> None:
    """Raise ConfigError when the folder to be replaced holds something that this script did not put there."""
    known = {"audio", "text", "metadata.jsonl"}
    if foreign := sorted(path.name for path in corpus.glob("*") if path.name not in known):
        raise ConfigError(f"{corpus} also holds {', '.join(foreign)}: move it away, or give another --output")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description="Make the sample corpus and its truth with espeak-ng.")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="for all that is random (%(default)s)")
    output_help = "folder that gets corpus/ and truth.jsonl (default: the folder of this script)"
    parser.add_argument("--output", type=Path, default=HERE, help=output_help)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make the corpus; return the exit code."""
    args = parse_args(argv)
    try:
        if shutil.which("espeak-ng") is None:
            raise ConfigError("espeak-ng is missing: install it (Debian: apt-get install espeak-ng)")
        data = read_sentences()
        refuse_foreign(args.output / "corpus")
        args.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".make_corpus-", dir=args.output) as folder:
            built = Path(folder)
            for name in ("corpus/audio", "corpus/text"):
                (built / name).mkdir(parents=True)
            rows = []
            for number, clip in enumerate(data["clip"], start=1):
                rows.append(make_clip(clip, data, args.seed, built / "corpus"))
                if sys.stderr.isatty():
                    end = "\n" if number == len(data["clip"]) else ""
                    print(
                        f"\r{number}/{len(data['clip'])} {clip['id']:<24}",
                        end=end,
                        file=sys.stderr,
                        flush=True,
                    )
            for path, index in ((built / "corpus" / "metadata.jsonl", 0), (built / "truth.jsonl", 1)):
                text = "".join(json.dumps(row[index], ensure_ascii=False) + "\n" for row in rows)
                path.write_text(text, encoding="utf-8")
            put_in_place(built, args.output)
    except (ConfigError, OSError) as error:
        print(f"make_corpus: {error}", file=sys.stderr)
        return EXIT_CONFIG
    seconds = sum(meta.get("duration", 0.0) for meta, _ in rows)
    clips = sum("duration" in meta for meta, _ in rows)
    texts = len(rows) - clips
    print(f"{args.output / 'corpus'}: {clips} clips, {seconds:.0f} s of audio; {texts} text without audio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
