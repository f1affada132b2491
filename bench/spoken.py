"""Spoken sentences by espeak-ng, to learn `speech_recognition` from; the recipe `spoken` reads it.

    apt-get install -y espeak-ng
    python -m bench.spoken speech     # speech/train.parquet and speech/heldout.parquet

Half of the texts are strings of digits, half short sentences of a small grammar. Voices, their
pitch and their speed vary; those of heldout.parquet speak nowhere in train.parquet, nor are its
sentences there. The same seed gives the same files, if espeak-ng is the same (1.51 here).
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
TRAIN_VOICES = (
    "m1",
    "m2",
    "m3",
    "m5",
    "m6",
    "m7",
    "f1",
    "f2",
    "f4",
    "f5",
    "Andy",
    "linda",
    "steph",
)
HELDOUT_VOICES = ("m4", "m8", "f3", "Michael", "belinda")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRAMMAR = (
    (("please", "now", "tom", "then", "maria"), ""),
    (("open", "close", "paint", "find", "clean", "show me", "look at", "wait for"),),
    (("the", "my", "her", "that", "every"),),
    (("red", "old", "small", "heavy", "broken", "quiet", "yellow", "long"), ""),
    (
        (
            "door",
            "window",
            "garden",
            "letter",
            "train",
            "kitchen",
            "bridge",
            "clock",
            "river",
            "box",
        ),
    ),
    (("today", "at noon", "before dinner", "in the morning", "with care", "on friday"), ""),
)
"""Words by place; a place with an empty string may be left out."""


NUM_TRAIN, NUM_HELDOUT = 2000, 200


def make_text(drawn: random.Random) -> str:
    """A string of three to seven digits, or a sentence."""
    if drawn.random() < 0.5:
        return " ".join(drawn.choice(DIGITS) for _ in range(drawn.randint(3, 7)))
    words = [drawn.choice(place[0]) for place in GRAMMAR if len(place) == 1 or drawn.random() < 0.5]
    return " ".join(words)


def speak(text: str, voice: str, *, pitch: int, speed: int) -> bytes:
    """A text as a wav file of 22,050 Hz."""
    done = subprocess.run(
        ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", text],
        capture_output=True,
        check=True,
    )
    return done.stdout


def as_flac(wav: bytes) -> bytes:
    """The same samples in half the bytes. espeak-ng writes a header that does not know how long it
    will speak."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def make_records(
    num: int, voices: tuple[str, ...], drawn: random.Random, known: set[str]
) -> Iterator[dict[str, Any]]:
    """Spoken texts; none that is `known`, which they are from now on."""
    asked = []
    fresh: set[str] = set()
    while len(asked) < num:
        text = make_text(drawn)
        if text in known:
            continue
        fresh.add(text)
        voice = f"{drawn.choice(ACCENTS)}+{drawn.choice(voices)}"
        asked.append((text, voice, drawn.randint(30, 70), drawn.randint(130, 190)))
    known |= fresh

    def record(ask: tuple[str, str, int, int]) -> dict[str, Any]:
        text, voice, pitch, speed = ask
        return {
            "audio": as_flac(speak(text, voice, pitch=pitch, speed=speed)),
            "text": text,
            "voice": voice,
        }

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(record, asked)


def write(folder: Path, *, num_train: int, num_heldout: int, seed: int = 0) -> None:
    """Both files, into a folder that may be new."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    drawn, known = random.Random(seed), set[str]()
    folder.mkdir(parents=True, exist_ok=True)
    for name, num, voices in (
        ("heldout", num_heldout, HELDOUT_VOICES),
        ("train", num_train, TRAIN_VOICES),
    ):
        records = list(make_records(num, voices, drawn, known))
        pq.write_table(
            pa.Table.from_pylist(records), folder / f"{name}.parquet", row_group_size=256
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.spoken", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=NUM_TRAIN, help="sentences to train on")
    parser.add_argument("--heldout", type=int, default=NUM_HELDOUT, help="those of other voices")
    given = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed: apt-get install -y espeak-ng")
    write(given.folder, num_train=given.train, num_heldout=given.heldout)


if __name__ == "__main__":
    main()
