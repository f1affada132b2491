"""From documents to tokens, as tasks share it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.tasks.rows import IGNORED, SEPARATOR, Encoded, Tools


def encode_texts(texts: pa.Array, tools: Tools, *, surrounded: bool) -> Encoded:
    """Texts as the tokeniser's ids; `surrounded`: with what stands around a document."""
    ids, lengths = tools.encode(texts)
    if not surrounded:
        return Encoded(ids.astype(tools.dtype), lengths)
    return Encoded(*surround(ids, lengths, tools.prefix, tools.suffix, tools.dtype))


def encode_texts_or_pairs(texts: pa.Array, tools: Tools, *, pairs: bool) -> Encoded:
    """Documents of one text, or of two with what stands between them: then `segment` says which of
    them a token is of. Of two that are too long the longer one is cut."""
    if not pairs:
        return encode_texts(texts, tools, surrounded=False)
    parts = pc.split_pattern(texts, SEPARATOR)
    (first, firsts), (second, seconds) = (
        tools.encode(pc.list_element(parts, place).cast(pa.large_string())) for place in (0, 1)
    )
    middle = np.array(tools.middle, first.dtype)
    room = max(0, tools.row_tokens - len(tools.prefix) - len(middle) - len(tools.suffix))
    half = room // 2
    kept = np.minimum(firsts, np.maximum(room - seconds, half))
    kept_second = np.minimum(seconds, room - kept)
    lengths = kept + len(middle) + kept_second
    tokens = np.empty(int(lengths.sum()), tools.dtype)
    segment = np.zeros(len(tokens), np.uint8)
    starts = np.cumsum(lengths) - lengths
    at, at_second = np.cumsum(firsts) - firsts, np.cumsum(seconds) - seconds
    for row, start in enumerate(starts.tolist()):
        behind = start + int(kept[row])
        ahead = behind + len(middle)
        tokens[start:behind] = first[at[row] : at[row] + kept[row]]
        tokens[behind:ahead] = middle
        stop = ahead + int(kept_second[row])
        tokens[ahead:stop] = second[at_second[row] : at_second[row] + kept_second[row]]
        segment[ahead:stop] = 1
    lost = firsts + seconds - kept - kept_second
    return Encoded(tokens, lengths, {"segment": segment}, num_lost=lost)


def encode_apart(texts: pa.Array, tools: Tools, *, second: str) -> Encoded:
    """Documents of two texts, the second as a varying column of that name with what the tokeniser
    puts around a text; of one text it is empty. Each has as much room as a row."""
    parts = pc.split_pattern(texts, SEPARATOR, max_splits=1)
    ids, lengths = tools.encode(pc.list_element(parts, 0).cast(pa.large_string()))
    others = parts.to_pylist()
    own, sizes = tools.encode(pa.array([(*pair, "")[1] for pair in others], pa.large_string()))
    room = max(0, tools.row_tokens - len(tools.prefix) - len(tools.suffix))
    kept = np.minimum(sizes, room)
    places = np.arange(len(own)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    whole, widths = surround(
        own[places < np.repeat(kept, sizes)], kept, tools.prefix, tools.suffix, "uint32"
    )
    there = np.array([len(pair) > 1 for pair in others], bool)
    widths = np.where(there, widths, 0)
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.cumsum([0, *widths]), pa.int64()),
        pa.array(whole[np.repeat(there, kept + len(tools.prefix) + len(tools.suffix))]),
    )
    return Encoded(
        ids.astype(tools.dtype), lengths, {second: lists}, num_lost=np.where(there, sizes - kept, 0)
    )


def name_sides(texts: pa.Array, sides: Sequence[str]) -> pa.Array:
    """Documents of several names with what each is of: the same name on two sides is two words."""
    parts = pc.split_pattern(texts, SEPARATOR)
    named = [
        pc.binary_join_element_wise(
            pa.scalar(f"{side}=", pa.large_string()),
            pc.list_element(parts, place).cast(pa.large_string()),
            pa.scalar("", pa.large_string()),
        )
        for place, side in enumerate(sides)
    ]
    return pc.binary_join_element_wise(*named, pa.scalar(SEPARATOR, pa.large_string()))


def encode_sequences(texts: pa.Array, tools: Tools) -> Encoded:
    """Sequences of words that are a token each. One that a row has no room for becomes several
    rows, the last of them full: `final` is 1 in that, and `before` has there what the others hold,
    as a varying column; else both are nothing."""
    ids, sizes = tools.encode(texts)
    num_pieces = np.maximum(1, -(-sizes // tools.row_tokens))
    records = np.repeat(np.arange(len(sizes)), num_pieces)
    ends = np.cumsum(num_pieces)
    final = np.zeros(len(records), np.uint8)
    final[ends - 1] = 1
    lengths = np.full(len(records), tools.row_tokens, np.int64)
    lengths[ends - num_pieces] = sizes - (num_pieces - 1) * tools.row_tokens
    earlier = np.where(final, (sizes - lengths[ends - 1])[records], 0)
    held = np.repeat(final, lengths) == 0
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.cumsum([0, *earlier]), pa.int64()), pa.array(ids[held].astype(np.int32))
    )
    return Encoded(
        ids.astype(tools.dtype), lengths, {"final": final, "before": lists}, records=records
    )


def encode_tagged_words(texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
    """Documents that are joined words, with joined tags: `tag` numbers the tag at a word's first
    token and is IGNORED at others, `window` counts the rows of one document.

    Words stand between spaces, as in a text. One of which no token begins (a rare mark that is
    nothing to the tokeniser) has no place for its tag, counts as lost, and is untold.
    """
    room = tools.row_tokens - len(tools.prefix) - len(tools.suffix)
    sentences = [text.split(SEPARATOR) for text in texts.to_pylist()]
    names = [] if targets is None else [text.split(SEPARATOR) for text in targets.to_pylist()]
    flat = [name for tags in names for name in tags] or [""] * sum(map(len, sentences))
    numbers = tools.number(pa.array(flat, pa.string())) if names else np.zeros(len(flat), np.int32)
    goes_on = np.array([name[:1] in ("I", "E") and name[1:2] == "-" for name in flat], bool)
    tokens: list[int] = []
    tags: list[int] = []
    lengths, records, windows, lost = [], [], [], []
    untold: dict[int, Sequence[int]] = {}
    done = 0
    joined = [" ".join(words) for words in sentences]
    encoded = zip(sentences, joined, tools.encode_words(joined), strict=True)
    for record, (words, text, (ids, places)) in enumerate(encoded):
        starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
        # A token may begin with the space before its word.
        own_places = [place + (text[place : place + 1] == " ") for place in places]
        word_of = np.searchsorted(starts, np.array(own_places, np.int64), side="right") - 1
        begins = np.ones(len(ids), bool)
        begins[1:] = word_of[1:] != word_of[:-1]
        own = np.full(len(ids), IGNORED, np.int32)
        inside = np.zeros(len(ids), bool)
        own[begins] = numbers[done + word_of[begins]]
        inside[begins] = goes_on[done + word_of[begins]]
        done += len(words)
        if missing := sorted(set(range(len(words))) - set(word_of[begins].tolist())):
            untold[record] = missing
        for nth, (start, stop) in enumerate(_windows(begins, inside, room)):
            tokens += ids[start:stop]
            tags += own[start:stop].tolist()
            lengths.append(stop - start)
            records.append(record)
            windows.append(nth)
            lost.append(0 if nth else len(words) - int(begins.sum()))
    return Encoded(
        np.array(tokens, tools.dtype),
        np.array(lengths, np.int64),
        {"tag": np.array(tags, np.int32), "window": np.array(windows, np.int32)},
        records=np.array(records, np.int64),
        num_lost=np.array(lost, np.int64),
        untold=untold,
    )


def _windows(
    begins: npt.NDArray[np.bool_], inside: npt.NDArray[np.bool_], room: int
) -> Iterator[tuple[int, int]]:
    """Pieces of at most `room` tokens: cut before a word at which no entity goes on, else before
    any word, else anywhere."""
    start, size = 0, len(begins)
    while size - start > room:
        places = np.arange(start + room, start + room // 2, -1)
        good = places[begins[places] & ~inside[places]]
        fair = places[begins[places]]
        stop = int((good if len(good) else fair if len(fair) else places)[0])
        yield start, stop
        start = stop
    yield start, size


def number_lists(names: pa.Array, tools: Tools) -> pa.Array:
    """Numbers of the names in joined lists, as lists."""
    parts = pc.split_pattern(names, SEPARATOR)
    values = parts.flatten()
    numbers = tools.number(values.filter(pc.not_equal(values, "")))
    lengths = [len([name for name in item if name]) for item in parts.to_pylist()]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers, pa.int32()))


def read_bytes(texts: pa.Array) -> list[bytes]:
    """The bytes that documents of one field of kind `bytes` are. Those of several are parted by
    SEPARATOR first (`pc.split_pattern`). Raises ValueError for what is no base64."""
    return [base64.b64decode(text, validate=True) for text in texts.to_pylist()]


def read_numbers(text: str, size: int) -> list[float] | str:
    """The numbers that a document of fields of kind `record` holds, each a number, a text of one or
    a list of numbers; or, in some words, why it is not `size` of them."""
    found: list[float] = []
    for part in text.split(SEPARATOR):
        value = json.loads(part)
        for one in value if isinstance(value, list) else [value]:
            try:
                if isinstance(one, bool) or not math.isfinite(number := float(one)):
                    return "what is no number in it"
            except (TypeError, ValueError, OverflowError):
                return "what is no number in it"
            found.append(number)
    return found if len(found) == size else f"not {size:,} numbers in it"


def join_lists(arrays: Sequence[npt.NDArray[Any]]) -> pa.LargeListArray:
    """Arrays without dimensions or with one, of one dtype, as lists: a varying column."""
    offsets = np.cumsum([0, *(array.size for array in arrays)])
    values = np.concatenate(arrays) if arrays else np.empty(0)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))


def encode_without(
    refused: Mapping[int, str],
    texts: pa.Array,
    targets: pa.Array,
    encode: Callable[[pa.Array, pa.Array], Encoded],
) -> Encoded:
    """Documents by `encode`, but for the records that are refused before, each with its reason."""
    kept = np.delete(np.arange(len(texts)), sorted(refused))
    encoded = encode(texts.take(kept), targets.take(kept))
    return replace(encoded, records=kept, refused=refused)


def with_columns(encoded: Encoded, **columns: Any) -> Encoded:
    """The same documents with further columns."""
    return replace(encoded, columns={**encoded.columns, **columns})


def surround(
    ids: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    prefix: Sequence[int],
    suffix: Sequence[int],
    dtype: str,
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
    """The documents' ids with `prefix` before and `suffix` after each, in the given type."""
    stops = np.cumsum(lengths + len(prefix) + len(suffix))
    starts = stops - lengths - len(prefix) - len(suffix)
    out = np.empty(len(ids) + len(lengths) * (len(prefix) + len(suffix)), dtype)
    inside = np.ones(len(out), bool)
    places = [starts + nth for nth in range(len(prefix))] + [
        stops - nth for nth in range(len(suffix), 0, -1)
    ]
    for place, token in zip(places, (*prefix, *suffix), strict=True):
        inside[place] = False
        out[place] = token
    out[inside] = ids
    return out, lengths + len(prefix) + len(suffix)


def encode_answered(
    texts: pa.Array, answers: pa.Array | None, tools: Tools, most_tokens: int
) -> Encoded:
    """Texts, and their answers as lists `answer` of at most so many tokens, with what ends them
    unless they are cut. Without answers the lists are empty."""
    ids, lengths = tools.encode(texts)
    found, lost = [np.empty(0, np.int32)] * len(texts), np.zeros(len(texts), np.int64)
    if answers is not None:
        most = min(most_tokens, tools.row_tokens)
        end = np.array(_end_of_answers(tools), np.int32)
        written, sizes = tools.encode(answers.cast(pa.large_string()))
        stops = np.cumsum(sizes)
        for row, (stop, size) in enumerate(zip(stops.tolist(), sizes.tolist(), strict=True)):
            whole = np.concatenate([written[stop - size : stop].astype(np.int32), end])
            found[row], lost[row] = whole[:most], max(0, len(whole) - most)
    columns = {"answer": join_lists(found) if found else join_lists([np.empty(0, np.int32)])[:0]}
    return Encoded(ids.astype(tools.dtype), lengths, columns, num_lost=lost)


def encode_answered_in_a_row(
    texts: pa.Array, answers: pa.Array | None, tools: Tools, most_tokens: int
) -> Encoded:
    """Texts with their answers behind them: `prompt` counts the tokens before an answer, `whole`
    tells whether it comes to its end. Of both that are too long for a row each has half of it, and
    a shorter one leaves the other its room. Without answers there is room for some."""
    _end_of_answers(tools)
    ids, lengths = tools.encode(texts)
    middle = np.array(tools.middle, ids.dtype)
    around = len(tools.prefix) + len(middle)
    room = max(0, tools.row_tokens - around - len(tools.suffix))
    if answers is None:
        written, sizes = ids[:0], np.zeros(len(texts), np.int64)
        kept_answers, wanted = sizes, np.full(len(texts), min(most_tokens, room // 2))
    else:
        written, sizes = tools.encode(answers.cast(pa.large_string()))
        most = np.minimum(most_tokens - 1, np.maximum(room - lengths, room // 2))
        kept_answers = wanted = np.minimum(sizes, most)
    kept = np.minimum(lengths, room - wanted)
    starts, answer_starts = np.cumsum(lengths) - lengths, np.cumsum(sizes) - sizes
    parts = []
    for row in range(len(texts)):
        parts += [
            ids[starts[row] : starts[row] + kept[row]],
            middle,
            written[answer_starts[row] : answer_starts[row] + kept_answers[row]],
        ]
    return Encoded(
        np.concatenate([ids[:0], *parts]).astype(tools.dtype),
        kept + len(middle) + kept_answers,
        {
            "prompt": (kept + around).astype(np.int32),
            "whole": (kept_answers == sizes).astype(np.uint8),
        },
        num_lost=lengths + sizes - kept - kept_answers,
    )


def _end_of_answers(tools: Tools) -> tuple[int, ...]:
    """The token that ends an answer. Raises ValueError where the tokeniser has none."""
    if not tools.suffix:
        raise ValueError("the tokeniser has no token that ends an answer")
    return tools.suffix[-1:]
