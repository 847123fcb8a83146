"""State by position, held against a NumPy oracle that keeps each sequence's values in a list of its own.

A small engine hands out pages: prompts in chunks, prefixes shared page by page, forks that copy the last page,
requests that lose their pages and are computed again, cancelled ones whose pages others get.
"""

import numpy as np
import pytest
import torch

from sense_v2.hf.serving import paged_state

PAGE, REACH, CHANNELS = 4, 3, 5


class Engine:
    """Pages and tables. Values are random, but the same for the same tokens so far, as a model's are."""

    def __init__(self, num_pages):
        self.pages_SX = torch.full((num_pages * PAGE, CHANNELS), float("nan"))
        self.free = list(range(num_pages))
        self.references = [0] * num_pages
        self.full_pages = {}
        self.tables, self.tokens, self.done = {}, {}, {}

    def _page(self):
        page = self.free.pop()
        self.references[page] = 1
        self.full_pages = {key: p for key, p in self.full_pages.items() if p != page}
        return page

    def add(self, name, tokens, *, share=True):
        table, done = [], 0
        while share and done + PAGE < len(tokens) and tuple(tokens[: done + PAGE]) in self.full_pages:
            page = self.full_pages[tuple(tokens[: done + PAGE])]
            if self.references[page] == 0:
                self.free.remove(page)
            self.references[page] += 1
            table.append(page)
            done += PAGE
        self.tables[name], self.tokens[name], self.done[name] = table, list(tokens), done

    def release(self, name):
        for page in self.tables[name]:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.insert(0, page)
        self.tables[name], self.done[name] = [], 0

    def remove(self, name):
        self.release(name)
        for kept in (self.tables, self.tokens, self.done):
            del kept[name]

    def fork(self, name, other):
        num_full = self.done[name] // PAGE
        table = self.tables[name][:num_full]
        for page in table:
            self.references[page] += 1
        for page in self.tables[name][num_full:]:
            copy = self._page()
            self.pages_SX[copy * PAGE : (copy + 1) * PAGE] = self.pages_SX[page * PAGE : (page + 1) * PAGE]
            table.append(copy)
        self.tables[other], self.tokens[other] = table, list(self.tokens[name])
        self.done[other] = self.done[name]

    def step(self, counts, through):
        """Process the next `counts` tokens of each named sequence; the result is what each position reads, [Q, X]."""
        names = list(counts)
        for name in names:
            while len(self.tables[name]) * PAGE < self.done[name] + counts[name]:
                self.tables[name].append(self._page())
        starts_N1 = torch.tensor(np.cumsum([0, *counts.values()]))
        before_N = torch.tensor([self.done[name] for name in names])
        layout = paged_state.step(starts_N1, before_N, num_new=int(starts_N1[-1]), reach=REACH)
        written = [slot for n in names for slot in self.slots(n, self.done[n], self.done[n] + counts[n])]
        if through == "block table":
            most = max(len(self.tables[name]) for name in names)
            table_NM = torch.tensor([self.tables[n] + [-1] * (most - len(self.tables[n])) for n in names])
            slots_NP = paged_state.slots_in_table(table_NM, layout.positions_NP, PAGE)
        else:
            reads = [self.slots(n, 0, self.done[n] + counts[n]) for n in names]
            ends_N = torch.tensor(np.cumsum([len(slots) for slots in reads])) - starts_N1.diff()
            read_index = torch.tensor(np.concatenate(reads))
            slots_NP = paged_state.slots_before(read_index, ends_N, layout.known_NP)
        new_TX = torch.tensor(np.concatenate([self.expected(n, self.done[n], counts[n]) for n in names]))
        past_NPX = paged_state.tail(self.pages_SX, slots_NP)
        paged_state.write(self.pages_SX, torch.tensor(written), new_TX)
        found_QX = layout.interleave(past_NPX, new_TX)
        for name in names:
            self.done[name] += counts[name]
            for end in range(PAGE, self.done[name] + 1, PAGE):
                self.full_pages.setdefault(tuple(self.tokens[name][:end]), self.tables[name][end // PAGE - 1])
        return layout, found_QX

    def slots(self, name, start, end):
        return [self.tables[name][p // PAGE] * PAGE + p % PAGE for p in range(start, end)]

    # The oracle: values of a sequence's positions, of nothing but its tokens

    def expected(self, name, start, count):
        return np.stack([value_of(self.tokens[name][: p + 1]) for p in range(start, start + count)])

    def expected_QX(self, counts, done):
        parts = []
        for name, count in counts.items():
            for position in range(done[name] - REACH, done[name] + count):
                parts.append(self.expected(name, position, 1)[0] if position >= 0 else np.zeros(CHANNELS, "f4"))
        return np.stack(parts)


def value_of(tokens):
    return np.random.default_rng(list(tokens)).normal(size=CHANNELS).astype("f4")


def check(engine, counts, through="block table"):
    done = dict(engine.done)
    layout, found_QX = engine.step(counts, through)
    np.testing.assert_array_equal(found_QX.numpy(), engine.expected_QX(counts, done))
    known = [p >= 0 for n, count in counts.items() for p in range(done[n] - REACH, done[n] + count)]
    assert layout.known().tolist() == known
    documents = [i for i, count in enumerate(counts.values(), 1) for _ in range(REACH + count)]
    assert layout.documents_Q.tolist() == documents
    assert layout.places_T.tolist() == [place for place, p in enumerate(new_positions(counts, done)) if p >= 0]
    rows_BQX = layout.as_batch(found_QX)
    if set(counts.values()) == {1}:  # nothing has to be said of documents: each sequence has a row of its own
        assert rows_BQX.shape == (len(counts), REACH + 1, CHANNELS)
        assert layout.documents_BQ is None
    else:
        assert rows_BQX.shape == (1, len(found_QX), CHANNELS)
        assert layout.documents_BQ.tolist() == [documents]


def new_positions(counts, done):
    """The new tokens' positions, -1 for those of pasts, in the step's order."""
    return [p if p >= done[n] else -1 for n, count in counts.items() for p in range(done[n] - REACH, done[n] + count)]


THROUGH = pytest.mark.parametrize("through", ["block table", "read index"])


@THROUGH
def test_a_prefill_in_chunks_and_single_tokens_beside_it(through):
    engine = Engine(12)
    engine.add("long", range(3, 20))
    engine.add("short", [7, 8, 9])
    check(engine, {"long": 1, "short": 2}, through)
    check(engine, {"short": 1, "long": 5}, through)
    engine.tokens["short"] += [30, 31, 32]
    check(engine, {"long": 2, "short": 1}, through)
    check(engine, {"long": 8, "short": 1}, through)
    check(engine, {"short": 1, "long": 1}, through)


@THROUGH
def test_a_shared_prefix(through):
    engine = Engine(12)
    prompt = list(range(3, 13))
    engine.add("first", prompt)
    check(engine, {"first": 10}, through)
    engine.add("second", [*prompt[:9], 50, 51])
    assert engine.done["second"] == 8
    assert engine.tables["second"] == engine.tables["first"][:2]
    check(engine, {"second": 3}, through)


@THROUGH
def test_forks_go_on_with_their_own_tokens(through):
    engine = Engine(12)
    engine.add("parent", range(3, 9))
    check(engine, {"parent": 6}, through)
    for child in ("a", "b"):
        engine.fork("parent", child)
    for number, name in enumerate(("parent", "a", "b")):
        engine.tokens[name] += [60 + number, 70 + number]
    for _ in range(2):
        check(engine, dict.fromkeys(("parent", "a", "b"), 1), through)


@THROUGH
def test_pages_of_a_cancelled_request_are_anothers(through):
    engine = Engine(3)
    engine.add("cancelled", range(3, 13), share=False)
    check(engine, {"cancelled": 10}, through)
    engine.remove("cancelled")
    engine.add("next", range(40, 50), share=False)
    check(engine, {"next": 1}, through)
    check(engine, {"next": 9}, through)


@THROUGH
def test_a_preempted_request_is_computed_again(through):
    engine = Engine(4)
    engine.add("one", range(3, 11))
    check(engine, {"one": 8}, through)
    engine.release("one")
    engine.add("other", range(50, 60))
    check(engine, {"other": 10}, through)
    engine.remove("other")
    engine.tokens["one"] += [90]
    check(engine, {"one": 9}, through)


@THROUGH
@pytest.mark.parametrize("seed", range(5))
def test_whatever_an_engine_does(through, seed):
    """Random requests, chunks, forks, preemptions and cancellations over few pages."""
    draw, engine, number = np.random.default_rng(seed), Engine(40), 0
    prefix = draw.integers(3, 90, 12).tolist()
    for _ in range(60):
        if len(engine.tables) < 5:
            tokens = prefix[: draw.integers(0, 13)] + draw.integers(3, 90, draw.integers(1, 8)).tolist()
            engine.add(f"r{number}", tokens)
            number += 1
        name = draw.choice(list(engine.tables))
        match draw.integers(0, 8):
            case 0:
                engine.remove(name)
            case 1:
                engine.release(name)
            case 2 if len(engine.tables) < 7 and engine.done[name]:
                engine.fork(name, f"{name}-{number}")
                number += 1
        counts = {}
        for name in list(engine.tables):
            left = len(engine.tokens[name]) - engine.done[name]
            if left == 0 and len(engine.tokens[name]) < 20:
                engine.tokens[name].append(int(draw.integers(3, 90)))
                left = 1
            if left == 0:
                engine.remove(name)
            elif draw.random() < 0.8:
                counts[str(name)] = int(draw.integers(1, left + 1))
        if counts:
            check(engine, counts, through)


def test_words_keep_every_bit():
    ids = torch.tensor([[7, -1], [2**31 - 1, 0x7FC00001]], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        count = paged_state.words_of(torch.int32, 2, dtype)
        words = paged_state.as_words(ids, dtype, count + 3)
        assert words.shape == (2, count + 3)
        assert torch.equal(paged_state.from_words(words, torch.int32, 2), ids)
