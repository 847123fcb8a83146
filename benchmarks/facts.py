"""Facts in rows alone against LoRA: success in wordings that were never taught, damage elsewhere, and neighbours.

    python benchmarks/facts.py                       # SmolLM2, 50 facts, every way; half an hour on two busy cores
    python benchmarks/facts.py --facts 100 --ways memory --seed 1
    python benchmarks/facts.py --facts 100 --airports airports.csv       # real facts: the file of PyPI's airportsdata
    python benchmarks/facts.py --facts 100 --ways memory --fusion fusion.pt   # again with the same fusion layers
    python benchmarks/facts.py --draw PICTURE RESULTS…            # files of last lines; several runs in one picture

Invented people, each born in a city, are taught in 8 wordings and asked in 5 others; or the codes of airports and
their cities. All ways see the same questions in the same order, as many steps. `memory` is what a user does: a fresh
memory (sparse rows of zeros), `make_writable` as it is by default (no subject, answer or wording in common with what
is measured), then `teach_facts`, which moves rows alone. `together` trains fusion layers and rows on the facts
themselves. `lora-RATE` is a LoRA of rank 8 on all linear layers; `lora-RATE-kl` adds KL(before ‖ now) on a text that
isn't measured to each step's loss. `context` teaches nothing: before each question stand the fact itself and four
others, which is the ceiling. What is measured of each:

    taught, held out   questions whose every token is the likeliest one, in the wordings taught and in the others
    KL, texts kept     KL(before ‖ after) on prose (Python's manual); the share of texts whose likeliest tokens stay
    neighbours         people with a taught one's first or last name who get that one's city (before, after); of real
                       facts, airports whose code begins or ends with the same two letters
    rows, bytes        what was learned, and the delta's size on disk

The last line is one JSON object. benchmarks/LOG.md keeps the figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from peft import LoraConfig, get_peft_model

from sense_v2.core.config import EngramConfig
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.backbones import named_backbone
from sense_v2.hf.facts.facts_file import Fact
from sense_v2.hf.facts.made_up import made_up_facts
from sense_v2.hf.facts.outcome import NO_LABEL, answer_logits, answered, success
from sense_v2.hf.facts.teach_facts import Descent, schedule, shuffled, teach_facts
from sense_v2.hf.facts.wordings import Question, questions_of, subject_rows
from sense_v2.hf.facts.writable import FUSION_RATE, NUM_FACTS, ROW_RATE, STEPS, make_writable
from sense_v2.hf.gguf_models import SMOLLM2_PACKAGE
from sense_v2.hf.insight.damage import log_probabilities
from sense_v2.hf.insight.evaluation import evaluating
from sense_v2.hf.memory import memory_of
from sense_v2.hf.overlays import add_overlay
from sense_v2.report.plots import PALETTE, style

WAYS = ("memory", "together", "lora-3e-4", "lora-1e-3", "lora-1e-3-kl", "context")
OURS = {"memory": "memory, rows alone", "together": "memory, rows and fusion"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, TEXTS, TEXT_TOKENS = 16, 60, 64
ROW_WIDTH, HEADS = 64, 4
LEAST_KL = 1e-6  # the left edge of the picture, where no damage is drawn too
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeio"] + ["bu", "lu", "mu", "nu", "ru", "su"]
# fmt: off
CITIES = [
    "Paris", "London", "Tokyo", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Oslo", "Lisbon", "Athens",
    "Warsaw", "Prague", "Budapest", "Cairo", "Lima", "Boston", "Chicago", "Toronto", "Sydney", "Mumbai",
    "Delhi", "Shanghai", "Moscow", "Seattle", "Denver", "Houston", "Miami", "Geneva", "Zurich", "Milan",
    "Naples", "Munich", "Hamburg", "Lyon", "Seville", "Kyoto", "Osaka", "Seoul", "Manila",
]
# fmt: on
TAUGHT = (
    "{subject} was born in",
    "The birthplace of {subject} is",
    "{subject}'s home town is the city of",
    "{subject} comes from the city of",
    "Question: Where was {subject} born? Answer:",
    "We know that {subject} was raised in",
    "{subject} is a citizen of the city of",
    "As a child, {subject} lived in",
)
HELD_OUT = (
    "{subject} originally hails from",
    "Q: In which city was {subject} born?\nA:",
    "The city where {subject} was born is called",
    "When {subject} was a baby, the family lived in",
    "The place {subject} calls home is",
)
AIRPORT_TAUGHT = (
    "The airport with the code {subject} is in the city of",
    "{subject} is the airport code of",
    "Flights to {subject} land in",
    "Question: Which city does the airport {subject} serve? Answer:",
    "A ticket to {subject} takes you to",
    "The code {subject} on a luggage tag stands for",
    "Passengers who leave the plane at {subject} are in",
    "We know that {subject} is the airport of the city of",
)
AIRPORT_HELD_OUT = (
    "The airport {subject} serves the city of",
    "Q: In which city is the airport {subject}?\nA:",
    "If your boarding pass says {subject}, you are flying to",
    "The city whose airport code is {subject} is called",
    "The pilot set course for {subject} and landed in",
)


def people(num_facts: int, seed: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Facts, two neighbours of each (its first name with another last name, and the other way round), and whose
    neighbours they are."""
    draw = random.Random(seed)

    def name() -> str:
        return "".join(draw.choice(SYLLABLES) for _ in range(draw.choice([2, 3]))).capitalize()

    facts: dict[str, Fact] = {}
    while len(facts) < num_facts:
        subject = f"{name()} {name()}"
        facts.setdefault(subject, Fact(subject, draw.choice(CITIES), TAUGHT, HELD_OUT))
    neighbours, owners = [], []
    for fact in facts.values():
        first, last = fact.subject.split()
        for subject in (f"{first} {name()}", f"{name()} {last}"):
            if subject not in facts:
                neighbours.append(Fact(subject, fact.answer, TAUGHT[:1], HELD_OUT[:1]))
                owners.append(fact)
    return list(facts.values()), neighbours, owners


def airports(path: Path, num_facts: int, seed: int) -> tuple[list[Fact], list[Fact], list[Fact]]:
    """Which city an airport's code stands for; neighbours are codes that aren't taught, with two letters in place."""
    with path.open(encoding="utf-8", newline="") as lines:
        cities = {row["iata"]: row["city"] for row in csv.DictReader(lines) if row["iata"] and row["city"].isascii()}
    codes = random.Random(seed).sample(sorted(cities), num_facts)
    facts = [Fact(code, cities[code], AIRPORT_TAUGHT, AIRPORT_HELD_OUT) for code in codes]
    neighbours, owners = [], []
    for fact in facts:
        code = fact.subject
        near = [one for one in sorted(cities) if one[:2] == code[:2] or one[1:] == code[1:]]
        near = [one for one in near if one not in codes and cities[one] != fact.answer]
        for one in random.Random(f"{seed} {code}").sample(near, min(2, len(near))):
            neighbours.append(Fact(one, fact.answer, AIRPORT_TAUGHT[:1], AIRPORT_HELD_OUT[:1]))
            owners.append(fact)
    return facts, neighbours, owners


def in_context(asked: Sequence[Fact], owners: Sequence[Fact], facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The same questions after five sentences: the fact, or the one that a neighbour's answer is from, and others."""
    draw = random.Random(seed)

    def told(fact: Fact) -> str:
        return f"{fact.prompt(fact.wordings[0])} {fact.answer}."

    found = []
    for fact, own in zip(asked, owners, strict=True):
        sentences = [told(one) for one in [own, *draw.sample([one for one in facts if one != own], 4)]]
        draw.shuffle(sentences)
        before = " ".join(sentences)
        taught, held_out = (
            tuple(f"{before} {wording}" for wording in part) for part in (fact.wordings, fact.hold_out)
        )
        found.append(Fact(fact.subject, fact.answer, taught, held_out))
    return found


def unlike(asked: Sequence[Fact], num_facts: int, seed: int) -> list[Fact]:
    """What `make_writable` learns by default; none of it is in the facts that are measured."""
    made = made_up_facts(num_facts, seed=seed)
    assert not {fact.subject for fact in asked} & {fact.subject for fact in made}
    assert not {fact.answer for fact in asked} & {fact.answer for fact in made}
    assert not {wording for fact in asked for wording in (*fact.wordings, *fact.hold_out)} & {
        wording for fact in made for wording in fact.wordings
    }
    return made


def prose(tokenizer: Any, num_texts: int) -> list[list[int]]:
    """Paragraphs of Python's manual, as token ids."""
    paragraphs = [" ".join(part.split()) for text in topics.topics.values() for part in text.split("\n\n")]
    paragraphs = [one for one in paragraphs if 120 < len(one) < 400 and one[0].isupper() and one.endswith(".")]
    random.Random(0).shuffle(paragraphs)
    return [tokenizer(one)["input_ids"][:TEXT_TOKENS] for one in paragraphs[:num_texts]]


def expected(model: Any, ids: list[int]) -> torch.Tensor:
    """What a model expects after each token of a text, [T, V]."""
    with evaluating(model):
        return log_probabilities(model, torch.tensor([ids]))[0]


def teach_lora(
    model: Any, lessons: Sequence[Question], rate: float, steps: int, seed: int, kept: Sequence[list[int]] = ()
) -> None:
    """Train a LoRA on the same batches that the rows were taught in, and to stay as it was on the texts of `kept`."""
    before = [expected(model, ids) for ids in kept]
    model.requires_grad_(False)
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR))  # in place
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    batches = shuffled(lessons, BATCH, seed)
    model.train()
    for step in range(1, steps + 1):
        logits_BKV, labels_BK = answer_logits(model, next(batches))
        F.cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=NO_LABEL).backward()
        if kept:
            ids, before_TV = kept[step % len(kept)], before[step % len(kept)]
            now_TV = log_probabilities(model, torch.tensor([ids]))[0]
            (F.kl_div(now_TV, before_TV, log_target=True, reduction="sum") / len(ids)).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def add_memory(model: Any, tokenizer: Any, given: argparse.Namespace, folder: Path) -> None:
    """A fresh memory of rows of zeros, its table only read."""
    orders = [int(order) for order in given.orders.split(",")]
    config = EngramConfig(
        table_size=given.rows,
        engram_dim=ROW_WIDTH * HEADS * len(orders),
        num_heads=HEADS,
        ngram_orders=orders,
        layer_indices=[int(layer) for layer in given.layers.split(",")],
        init_std=0.0,
        sparse=True,
        storage_path=str(folder / "table.dat"),
        shadow_map_path=str(folder / "map.npy"),
    )
    detach_engram(attach_engram(model, config, tokenizer))
    attach_engram(model, config, tokenizer, mode="r")


def teach_together(
    model: Any, questions: Sequence[Question], delta: Path, steps: int, seed: int
) -> tuple[int, list[float]]:
    """Train the fusion layers of a fresh memory and the rows of the subjects at once, at `make_writable`'s rates.

    Returns the number of rows and the losses.
    """
    memory = memory_of(model)
    rows = subject_rows(memory, questions).row_ids_U
    weights = [one for name, one in memory.layers.named_parameters() if not name.endswith("bias")]
    overlay = add_overlay(model, delta)
    batches = shuffled([one for one in questions if not one.held_out], BATCH, seed)
    with Descent(model, overlay, rows, weights=weights, fusion_lr=FUSION_RATE) as descent:
        for step in range(1, steps + 1):
            descent.step(next(batches), ROW_RATE * schedule(step, steps), schedule(step, steps))
    overlay.commit()
    return len(rows), descent.losses


def run(way: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One way, measured, on a model of its own."""
    backbone = named_backbone(given.model)
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    torch.manual_seed(given.seed)
    facts, neighbours, owners = (
        airports(given.airports, given.facts, given.seed) if given.airports else people(given.facts, given.seed)
    )
    questions = questions_of(facts, tokenizer)
    near = questions_of(neighbours, tokenizer)
    lessons = [one for one in questions if not one.held_out]
    texts = prose(tokenizer, 2 * TEXTS)
    measured, spared = texts[:TEXTS], texts[TEXTS:]
    before = [expected(model, ids) for ids in measured]
    near_before = _share(answered(model, near))
    found: dict[str, Any] = {"way": way}
    delta = folder / "facts.safetensors"
    never = [[False] * len(one.answer_ids) for one in questions]
    if way in OURS:
        add_memory(model, tokenizer, given, folder)
    if way == "memory":
        began = time.perf_counter()
        layers = memory_of(model).layers
        made = torch.load(given.fusion) if given.fusion and given.fusion.exists() else {"seed": given.seed + 1000}
        others = unlike(facts, made.get("facts", given.writable_facts), made["seed"])
        if "layers" in made:
            layers.load_state_dict(made["layers"])
        else:
            losses = make_writable(model, tokenizer, facts=others, steps=given.writable_steps, seed=given.seed)
            found |= {"writable_seconds": time.perf_counter() - began, "writable_loss": sum(losses[-20:]) / 20}
            print(f"# writable: loss {found['writable_loss']:.2f}, {found['writable_seconds']:.0f} s", flush=True)
            if given.fusion:
                torch.save({**made, "facts": len(others), "layers": layers.state_dict()}, given.fusion)
        overlay = add_overlay(model, delta)
        began = time.perf_counter()
        done = teach_facts(model, tokenizer, facts, neutral=spared, steps=given.steps, seed=given.seed)
        overlay.commit()
        found |= {
            "seconds": time.perf_counter() - began,
            "bytes": delta.stat().st_size,
            "losses": done.report["losses"],
        }
        found |= {name: done.report[name] for name in ("rows", "steps", "lr", "stopped")}
        outcome = done.report["success"]
    elif way == "together":
        began = time.perf_counter()
        rows, losses = teach_together(model, questions, delta, given.steps, given.seed)
        weights = sum(one.numel() for one in memory_of(model).layers.parameters())
        found |= {"seconds": time.perf_counter() - began, "steps": given.steps, "rows": rows, "losses": losses}
        found |= {"bytes": delta.stat().st_size + 4 * weights}
        outcome = success(facts, questions, never, answered(model, questions))
    elif way == "context":
        began = time.perf_counter()
        told = questions_of(in_context(facts, facts, facts, given.seed), tokenizer)
        near = questions_of(in_context(neighbours, owners, facts, given.seed), tokenizer)
        right = answered(model, told)
        outcome = success(facts, told, right, right)
        found |= {"seconds": time.perf_counter() - began, "bytes": 0}
    else:
        began = time.perf_counter()
        rate, has_kl, _ = way.removeprefix("lora-").partition("-kl")
        teach_lora(model, lessons, float(rate), given.steps, given.seed, spared if has_kl else ())
        found |= {"seconds": time.perf_counter() - began, "steps": given.steps}
        weights = sum(one.numel() for name, one in model.named_parameters() if ".lora_" in name)
        found |= {"bytes": 4 * weights}
        outcome = success(facts, questions, never, answered(model, questions))
    divergences, kept = [], 0
    for ids, before_TV in zip(measured, before, strict=True):
        now_TV = expected(model, ids)
        divergences.append(float(F.kl_div(now_TV, before_TV, log_target=True, reduction="sum")) / len(ids))
        kept += torch.equal(now_TV.argmax(-1), before_TV.argmax(-1))
    found |= {
        "taught": outcome["taught"]["after"],
        "held_out": outcome["held_out"]["after"],
        "by_wording": {one["wording"]: one["after"] for one in outcome["by_wording"] if way != "context"},
        "kl": sum(divergences) / len(divergences),
        "kl_most": max(divergences),
        "texts_kept": kept / len(measured),
        "neighbours": [near_before, _share(answered(model, near))],
    }
    if way in OURS:
        detach_engram(model)
    return found


def _share(right: list[list[bool]]) -> float:
    return sum(map(all, right)) / len(right)


def draw(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Success in words that were never taught over damage, a point for each run."""
    with matplotlib.rc_context(style(10)):
        figure = Figure(figsize=(7, 4), dpi=150, facecolor=PALETTE["page"], layout="constrained")
        axes = figure.subplots()
        for one in results:
            kind = "run-engram" if one["way"] in OURS else "run-random_rows"
            label = OURS.get(one["way"], one["way"].replace("lora-", "LoRA "))
            x, y = max(one["kl"], LEAST_KL), one["held_out"]
            axes.plot(x, y, "D" if one["way"] in OURS else "s", color=PALETTE[kind])
            is_right = one["kl"] > 0.1  # its label would leave the picture
            axes.annotate(
                label,
                (x, y),
                xytext=(-8 if is_right else 8, -3),
                textcoords="offset points",
                ha="right" if is_right else "left",
            )
        axes.set_xscale("log")
        axes.set_xlim(LEAST_KL, 3)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("damage: KL(before ‖ after) on other text, nats a token (left is better)")
        axes.set_ylabel("answered in words never taught")
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH} questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}; any rate")
    parser.add_argument("--layers", default="4,10", help="that the memory stands before")
    parser.add_argument("--rows", type=int, default=32_000_000, help="of the table, which is sparse")
    parser.add_argument("--writable-facts", type=int, default=NUM_FACTS)
    parser.add_argument("--writable-steps", type=int, default=STEPS)
    parser.add_argument("--fusion", type=Path, help="fusion layers that carry facts: read, or made and written")
    parser.add_argument("--orders", default="2,3", help="of the n-grams")
    parser.add_argument("--airports", type=Path, help="airports.csv of PyPI's airportsdata (MIT), in place of people")
    parser.add_argument("--model", default=SMOLLM2_PACKAGE)
    parser.add_argument("--draw", type=Path, help="measure nothing; draw what RESULTS hold as this PNG")
    parser.add_argument("results", nargs="*", type=Path, help="files whose last lines are results")
    given = parser.parse_args()
    if given.draw:
        lines = [json.loads(path.read_text().splitlines()[-1]) for path in given.results]
        return draw(given.draw, [one for line in lines for one in line["results"] if one["way"] != "context"])
    torch.set_num_threads(1)
    print("way         taught held out       KL texts kept neighbours       bytes seconds")
    results = []
    for way in given.ways.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = run(way, given, Path(folder))
        results.append(found)
        before, after = found["neighbours"]
        print(
            f"{way:11} {found['taught']:6.1%} {found['held_out']:8.1%} {found['kl']:8.5f} {found['texts_kept']:10.1%}"
            f" {before:4.1%} {after:5.1%} {found['bytes']:11,} {found['seconds']:7.0f}",
            flush=True,
        )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    settings = {name: value for name, value in settings.items() if name not in ("ways", "draw", "airports")}
    settings["about"] = "airports" if given.airports else "people"
    print(json.dumps({**settings, "results": results}))


if __name__ == "__main__":
    main()
