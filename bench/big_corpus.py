#!/usr/bin/env python3
"""Write a corpus of any size in the crawler's format, for benchmarks.

The lines are all different; they share a few thousand audio and text files, so that a million of them
take half a gigabyte. The clips are short on purpose: what grows with a corpus is its number of lines, while
hashing audio costs the same in every way of reading it.
"""

import argparse
import json
import math
import random
import struct
import wave
from datetime import date, timedelta
from pathlib import Path

AUDIO_FILES = 2_000
TEXT_FILES = 4_000
CLIP_SECONDS = 0.1
SAMPLE_RATE = 16_000
VIETNAMESE = "hôm nay chúng ta sẽ nói về cách học tiếng Anh hiệu quả và những người bạn ở thành phố Hồ Chí Minh"
ENGLISH = "meeting deadline feedback project team okay so basically the machine learning model is really good"


def write_corpus(folder: Path, lines: int, seed: int = 1) -> None:
    """Write `metadata.jsonl`, `audio/` and `text/` below a folder.

    Args:
        folder: made if it is not there.
        lines: how many samples.
        seed: the same seed gives the same bytes.
    """
    dice = random.Random(seed)
    for name in ("audio", "text"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(AUDIO_FILES):
        _write_clip(folder / "audio" / f"{number:05d}.wav", pitch=dice.uniform(100, 400))
    for number in range(TEXT_FILES):
        _write_text(folder / "text" / f"{number:05d}.vi.json", dice, f"{VIETNAMESE} {ENGLISH}", language="vi")
        _write_text(folder / "text" / f"{number:05d}.en.json", dice, ENGLISH, language="vi", target_language="en")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as output:
        for number in range(lines):
            output.write(json.dumps(_line(number, dice), ensure_ascii=False) + "\n")


def _write_clip(file: Path, pitch: float) -> None:
    samples = [
        round(8_000 * math.sin(2 * math.pi * pitch * moment / SAMPLE_RATE))
        for moment in range(round(CLIP_SECONDS * SAMPLE_RATE))
    ]
    with wave.open(str(file), "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(SAMPLE_RATE)
        clip.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def _write_text(file: Path, dice: random.Random, words: str, **languages: str) -> None:
    segments = [
        {"text": " ".join(dice.choices(words.split(), k=8)), "start": 2.5 * number, "end": 2.5 * (number + 1)}
        for number in range(3)
    ]
    full_text = " ".join(str(segment["text"]) for segment in segments)
    document = {**languages, "subtitle_type": "auto", "segments": segments, "full_text": full_text}
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _line(number: int, dice: random.Random) -> dict[str, object]:
    return {
        "id": f"clip-{number:08d}",
        "type": "youtube_with_transcript",
        "file_path": f"audio/{number % AUDIO_FILES:05d}.wav",
        "duration": CLIP_SECONDS,
        "language_tags": ["vi", "en"],
        "captured_at": str(date(2025, 1, 1) + timedelta(days=number % 300)),
        "url": f"https://video.example/watch?v={number:08d}",
        "title": " ".join(dice.choices(VIETNAMESE.split(), k=6)),
        "channel_id": f"channel-{number % 997}",
        "acoustic_meta": {"sample_rate": SAMPLE_RATE, "channels": 1, "format": "wav"},
        "transcript_file": f"text/{number % TEXT_FILES:05d}.vi.json",
        "translation_file": f"text/{dice.randrange(TEXT_FILES):05d}.en.json",
        "transcript_language": "vi",
        "cs_ratio": round(dice.random(), 3),
    }


def main() -> None:
    """Read the command line and write the corpus."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where to write it; made if it is not there")
    options.add_argument("--lines", type=int, default=1_000_000, help="how many samples (default: 1000000)")
    options.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus (default: 1)")
    arguments = options.parse_args()
    write_corpus(arguments.folder, arguments.lines, arguments.seed)


if __name__ == "__main__":
    main()
