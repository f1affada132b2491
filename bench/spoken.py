"""Spoken sentences by espeak-ng, to learn `speech_recognition` from; the recipe `spoken` reads it.

    apt-get install -y espeak-ng
    python -m bench.spoken speech               # speech/train.parquet and speech/heldout.parquet
    python -m bench.spoken speech --baseline    # what a linear model makes of them

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


def baseline(folder: Path, *, epochs: int = 30, context: int = 5, seed: int = 0) -> float:
    """Characters wrong of a linear model: each 20 ms, with the `context` before and behind it, to
    letters, by the same loss and the same features. Of the heldout voices, read greedily."""
    import jiwer
    import pyarrow.parquet as pq
    import torch
    import torch.nn.functional as F

    from dray.tasks.parts.alignments import read_greedily
    from dray.tasks.parts.sounds import STACKED, log_mel, read_sound

    letters = " 'abcdefghijklmnopqrstuvwxyz"

    def load(name: str) -> list[tuple[Any, str]]:
        rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
        found = []
        for row in rows:
            tokens = torch.from_numpy(log_mel(read_sound(row["audio"])))
            around = F.pad(tokens, (0, 0, context, context)).unfold(0, 2 * context + 1, 1)
            found.append((around.reshape(len(tokens), -1), row["text"]))
        return found

    torch.manual_seed(seed)
    model = torch.nn.Linear(STACKED * (2 * context + 1), len(letters) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = load("train")
    for _ in range(epochs):
        random.Random(seed).shuffle(rows)
        for first in range(0, len(rows), 16):
            loss = torch.zeros(())
            for tokens, text in rows[first : first + 16]:
                scores = model(tokens).log_softmax(dim=-1)
                target = torch.tensor([letters.index(letter) + 1 for letter in text])
                sizes = torch.tensor(len(tokens)), torch.tensor(len(target))
                loss = loss + F.ctc_loss(scores, target, *sizes, reduction="sum") / len(target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    wanted, found = [], []
    with torch.no_grad():
        for tokens, text in load("heldout"):
            scores = model(tokens).log_softmax(dim=-1)[None]
            (read,) = read_greedily(scores, torch.tensor([len(tokens)]))
            wanted.append(text)
            found.append("".join(letters[letter - 1] for letter in read).strip())
    return float(jiwer.cer(wanted, found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.spoken", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=NUM_TRAIN, help="sentences to train on")
    parser.add_argument("--heldout", type=int, default=NUM_HELDOUT, help="those of other voices")
    parser.add_argument("--baseline", action="store_true", help="measure a linear model instead")
    given = parser.parse_args()
    if given.baseline:
        print(f"a linear model: {baseline(given.folder):.1%} of the characters wrong")
        return
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed: apt-get install -y espeak-ng")
    write(given.folder, num_train=given.train, num_heldout=given.heldout)


if __name__ == "__main__":
    main()
