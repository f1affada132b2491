"""The engine against the model's own `generate`, whatever else is in the batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from dray.serve.generation import Ask, Engine, Finish, Said, make_steps
from dray.serve.refusals import Refusal
from dray.serve.sampling import Drawn, Sampling
from dray.serve.slots import CHUNK_TOKENS, Alone, Slots
from small_models import VOCAB, small_model, small_spec
from tiny import source_for

GREEDY = Sampling(temperature=0)


def lively_model(architecture: str, row_tokens: int = 512) -> Any:
    """One whose weights are so large that its words differ from each other."""
    data = {"train": [source_for("causal_lm")], "sequence_tokens": row_tokens}
    model = small_model(small_spec(architecture, sections={"data": data}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def generated(model: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    found = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    return list(found[0, len(ids) :].tolist())


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(0x4E00 + token) for token in ids)


class Told:
    """What an engine says of some answers."""

    def __init__(self, number: int) -> None:
        self.drawn: list[list[Drawn]] = [[] for _ in range(number)]
        self.texts = [""] * number
        self.finish: list[Finish | None] = [None] * number
        self._left = threading.Semaphore(0)

    def sink(self, place: int) -> Any:
        def tell(said: Said) -> None:
            if said.drawn is not None:
                self.drawn[place].append(said.drawn)
            self.texts[place] += said.text
            if said.finish is not None:
                self.finish[place] = said.finish
                self._left.release()

        return tell

    def wait(self) -> list[list[int]]:
        for _ in self.drawn:
            assert self._left.acquire(timeout=300)
        return [[one.token for one in some] for some in self.drawn]


def ask(engine: Engine, asks: Sequence[Ask]) -> Told:
    told = Told(len(asks))
    engine.submit(asks, [told.sink(place) for place in range(len(asks))])
    return told


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_model("llama")


@pytest.fixture
def engine(model: Any) -> Iterator[Engine]:
    found = Engine(
        make_steps(model, VOCAB, free_bytes=10**9, longest=512, num_slots=6),
        letters,
        max_waiting=40,
    )
    yield found
    found.close()


def test_answers_that_join_and_leave_are_those_of_generate(model: Any, engine: Engine):
    """More than there are slots, of many lengths, some in several pieces, one after another."""
    assert isinstance(engine.steps, Slots)
    some = prompts(3, 9, CHUNK_TOKENS + 20, 1, 33, 90, 17, 2, CHUNK_TOKENS, 5)
    sizes = [5 + 3 * place for place in range(len(some))]
    told = []
    for ids, size in zip(some, sizes, strict=True):
        told.append(ask(engine, [Ask(ids, size, GREEDY)]))
        time.sleep(0.01)
    for one, ids, size in zip(told, some, sizes, strict=True):
        assert one.wait() == [generated(model, ids, size)]
        assert one.finish == ["length"]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "mistral", "gemma2"])
def test_other_architectures_write_what_generate_does(architecture: str):
    """Those with a window, by their own cache, one after the other."""
    model = lively_model(architecture, 64)
    steps = make_steps(model, VOCAB, free_bytes=10**8, longest=64)
    assert isinstance(steps, Slots if architecture in ("gpt2", "gpt_neox") else Alone)
    engine = Engine(steps, letters)
    try:
        some = prompts(7, 2, 20)
        found = ask(engine, [Ask(ids, 9, GREEDY) for ids in some]).wait()
        assert found == [generated(model, ids, 9) for ids in some]
    finally:
        engine.close()


def test_answers_stay_what_they_are_while_others_end(model: Any, engine: Engine):
    """Whoever ends gives the place to another one in the middle of a step."""
    some = prompts(4, 5, 3, 6, 7, 4)
    told = ask(engine, [Ask(ids, 8 + 3 * place, GREEDY) for place, ids in enumerate(some)])
    found = told.wait()
    for place, ids in enumerate(some):
        assert found[place] == generated(model, ids, 8 + 3 * place)


def test_a_seed_gives_the_same_text_whatever_is_beside_it(engine: Engine):
    (ids,) = prompts(12)
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=7)
    (alone,) = ask(engine, [Ask(ids, 30, sampling)]).wait()
    beside = [ask(engine, [Ask(other, 60, Sampling())]) for other in prompts(3, 40, 5, 77)]
    (again,) = ask(engine, [Ask(ids, 30, sampling)]).wait()
    assert again == alone
    others = ask(engine, [Ask(ids, 30, sampling, place=1), Ask(ids, 30, Sampling(seed=8))]).wait()
    assert all(other != alone for other in others)
    for one in beside:
        one.wait()


def test_logprobs_are_those_of_a_forward_pass(model: Any, engine: Engine):
    (ids,) = prompts(8)
    told = ask(engine, [Ask(ids, 4, Sampling(temperature=0, top_logprobs=3))])
    (tokens,) = told.wait()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    for place, drawn in enumerate(told.drawn[0]):
        assert drawn.logprob == pytest.approx(float(expected[place, drawn.token]), abs=1e-3)
        values, top = expected[place].topk(3)
        assert [token for token, _ in drawn.top] == top.tolist()
        assert [value for _, value in drawn.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_penalties_and_biases_change_what_is_written(engine: Engine):
    (ids,) = prompts(6)
    never = ask(engine, [Ask(ids, 8, Sampling(temperature=0, bias={9: 100.0}))]).wait()
    assert never == [[9] * 8]
    varied = Sampling(temperature=0, bias={9: 100.0, 8: 99.0}, presence_penalty=50.0)
    assert ask(engine, [Ask(ids, 2, varied)]).wait() == [[9, 8]]


def test_tokens_that_end_and_strings_that_stop(engine: Engine):
    (ids,) = prompts(6)
    (tokens,) = ask(engine, [Ask(ids, 20, GREEDY)]).wait()
    first = tokens.index(tokens[7])
    told = ask(engine, [Ask(ids, 20, GREEDY, ends=[tokens[7]])])
    told.wait()
    assert (told.finish, told.texts) == (["stop"], [letters(tokens[:first])])
    stop = letters(tokens[4:6])
    told = ask(engine, [Ask(ids, 20, GREEDY, stops=[stop])])
    told.wait()
    whole = letters(tokens)
    assert (told.finish, told.texts) == (["stop"], [whole[: whole.index(stop)]])


def test_who_leaves_frees_the_place_and_late_ones_end(engine: Engine):
    told = Told(2)
    asks = [Ask(ids, 400, GREEDY) for ids in prompts(4, 5)]
    gone = engine.submit(asks, [told.sink(0), told.sink(1)])
    late = ask(engine, [Ask(ids, 400, GREEDY, deadline=time.monotonic()) for ids in prompts(3)])
    late.wait()
    assert late.finish == ["time"]
    engine.leave(gone)
    told.wait()
    assert told.finish == ["gone", "gone"]
    load = engine.load()
    assert (load.num_writing, load.num_waiting) == (0, 0)


def test_what_is_too_much_is_refused_and_the_rest_is_written(model: Any, engine: Engine):
    with pytest.raises(Refusal, match="together they may be 512"):
        ask(engine, [Ask(prompts(500)[0], 13, GREEDY)])
    many = [Ask(ids, 3, GREEDY) for ids in prompts(*[4] * 46)]
    first = ask(engine, many)

    def ask_on() -> None:
        for _ in range(50):
            ask(engine, many)

    with pytest.raises(Refusal, match="wait already") as caught:
        ask_on()
    assert caught.value.status == 429
    assert caught.value.retry_after is not None
    assert first.wait()[-1] == generated(model, many[-1].ids, 3)


def test_a_model_that_breaks_ends_every_answer_with_a_cause(model: Any):
    steps = make_steps(model, VOCAB, free_bytes=10**8, longest=64)
    engine = Engine(steps, letters)
    told = ask(engine, [Ask([VOCAB + 5], 3, GREEDY)])  # no such token
    told.wait()
    assert told.finish == ["failed"]
    engine.close()
    assert isinstance(engine.error, IndexError)
    with pytest.raises(Refusal, match="shut down"):
        ask(engine, [Ask([5], 3, GREEDY)])


def test_slots_are_as_many_as_memory_holds(model: Any):
    few = make_steps(model, VOCAB, free_bytes=2 * 10**6, longest=256)
    many = make_steps(model, VOCAB, free_bytes=10**9, longest=256)
    assert 1 <= few.num_slots < many.num_slots == 32
