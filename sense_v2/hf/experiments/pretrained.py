"""A pretrained model reads new text: memory beside a LoRA, both, and what each one loses.

    backbone ──▶ held-out loss, and texts that it writes by itself
       ├─ counted       rows hold what follows each n-gram of the text; no step is taken
       ├─ memory        the same, and then rows and fusion layers learn from text that wasn't counted
       ├─ lora          the text for as many seconds as the memory took, by step times measured in turns
       ├─ both          counted rows and a LoRA beside them, as many steps as the memory
       └─ random_rows   the memory's control: its rows stay noise

All share the seed and the schedule. The weights of the backbone never change, so it is the
untouched model whenever memory and LoRA are off. What comes out is one dictionary, from which a report is made, and
the model with its memory in a folder.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from sense_v2.core.config import EngramConfig, TrainConfig
from sense_v2.core.folders import refuse_other_encodings
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.adapters import with_lora
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.backbones import Backbone, named_backbone, token_stream
from sense_v2.hf.data.corpus import Batches, Corpus, read_corpus
from sense_v2.hf.data.held_out import save_corpus
from sense_v2.hf.experiments.controls import freeze_rows
from sense_v2.hf.experiments.from_scratch import Watcher, compare_steps, continuations, machine, own_table
from sense_v2.hf.insight.ablation import paired_bootstrap
from sense_v2.hf.insight.damage import damage, own_samples, untouched
from sense_v2.hf.insight.evaluation import Evaluation, count_text_bytes, token_losses
from sense_v2.hf.memory import memory_of, trainable_parameters
from sense_v2.hf.saving.backbone_facts import backbone_reference
from sense_v2.hf.saving.folder import memory_paths
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.saving.staged_folder import staged_folder
from sense_v2.hf.training.counted_rows import count_rows
from sense_v2.hf.training.fit import fit
from sense_v2.hf.training.fresh_model import late_memory_for
from sense_v2.hf.training.run import MOST_NOT_COUNTED, default_config

LORA_RANK = 8
STEPS, BATCH, LENGTH, HELD_OUT_SEQUENCES = 60, 4, 128, 32
MAX_CORPUS_BYTES = 8 * 2**20
"""A run reads a fraction of it; more would take longer to tokenise."""
SAMPLES, SAMPLE_TOKENS = 16, 64
STEP_TIME_ROUNDS, BLOCK_STEPS = 6, 1
PROMPTS, PROMPT_TOKENS = 3, 32
RESAMPLES = 10_000


@dataclass(frozen=True)
class Way:
    """One way to teach a model new text."""

    label: str
    description: str
    has_memory: bool = False
    has_lora: bool = False


WAYS = {
    "untouched": Way("the model as it is", "nothing is trained"),
    "counted": Way("memory, counted", "rows hold what follows each n-gram; nothing is trained", has_memory=True),
    "memory": Way("memory", "counted, and then rows and fusion layers learn from other text", has_memory=True),
    "lora": Way("LoRA", f"rank {LORA_RANK} on every linear layer, for as many seconds", has_lora=True),
    "both": Way("memory and LoRA", "counted rows, and as many steps as the memory", has_memory=True, has_lora=True),
    "random_rows": Way("random rows", "the memory’s table stays noise; its fusion layers learn", has_memory=True),
}


def pretrained_settings(name: str, **changes: Any) -> TrainConfig:
    """How all ways are trained: the rates of `train --model` and `train --lora-rank`."""
    shape = {"steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH, "eval_sequences": HELD_OUT_SEQUENCES}
    settings = dataclasses.replace(default_config(name, LORA_RANK, counts=True).train, **{**shape, **changes})
    return dataclasses.replace(
        settings,
        train_backbone=False,
        lora_rank=LORA_RANK,
        warmup_steps=max(1, settings.steps // 10),
        eval_every=0,
        commit_every=0,
    )


def young_code() -> tuple[str, list[Path]]:
    """The modelling code of transformers, most of it younger than a small pretrained model: its name, and files.

    Each architecture's own file, so that no other version of a held-out one is trained on.
    """
    folder = Path(transformers.__file__).parent / "models"
    return "transformers' modelling code", sorted(folder.glob("*/modeling_*.py"))


@contextmanager
def adapted(
    model: PreTrainedModel, memory: EngramConfig | None, lora_rank: int, tokenizer: Any
) -> Iterator[PreTrainedModel]:
    """Give the model with a fresh memory, a fresh LoRA or both, to be trained; afterwards it is what it was."""
    model.requires_grad_(False)
    with ExitStack() as done:
        if memory is not None:
            attach_engram(model, memory, tokenizer)
            done.callback(detach_engram, model)
        wrapper = with_lora(model, lora_rank)
        if wrapper is not model:
            done.callback(wrapper.unload)
        yield wrapper


def run_pretrained(
    name: str,
    corpus: Sequence[str | Path] | None,
    output: Path,
    *,
    settings: TrainConfig | None = None,
    engram: EngramConfig | None = None,
    controls: bool = True,
    watcher: Watcher | None = None,
    text_column: str = "text",
) -> dict[str, Any]:
    """Train a pretrained model in each way and compare.

    Args:
        name: Of the model, as `named_backbone` takes it.
        corpus: Files and folders; None is transformers' own modelling code.
        output: Gets the model with its memory, in `model`.
        settings: How all ways are trained; by default `pretrained_settings(name)`.
        engram: The memory, of zeros, with layers and width; by default what suits the model. Its paths don't count.
        controls: Whether both together, and random rows, are trained, too.
        watcher: What the experiment tells while it goes on.
        text_column: Where documents have their text.

    Returns:
        The results, as `sense_v2.report.pretrained` says.

    Raises:
        CommandError: The model can't be opened, or peft is missing. What reading the corpus raises comes as it is.
    """
    refuse_other_encodings(output, output.resolve())
    started = time.perf_counter()
    watcher = watcher or Watcher()
    settings = pretrained_settings(name) if settings is None else settings
    if corpus is None:
        corpus_name, corpus = young_code()
    else:
        corpus_name = None
    text = read_corpus(corpus, max_bytes=MAX_CORPUS_BYTES, text_column=text_column)
    text = dataclasses.replace(text, name=corpus_name or text.name)
    watcher.corpus_opened(text)
    backbone = named_backbone(name)
    engram = late_memory_for(backbone.model, default_config(name).engram) if engram is None else engram
    with staged_folder(output / "model", force=True) as staging:
        results = _run_in(staging, backbone, text, settings, engram, controls, watcher)
        save_corpus(staging, corpus, text_column)
    return {**results, "seconds": time.perf_counter() - started}


def _run_in(
    staging: Path,
    backbone: Backbone,
    text: Corpus,
    settings: TrainConfig,
    engram: EngramConfig,
    controls: bool,
    watcher: Watcher,
) -> dict[str, Any]:
    model, tokenizer = backbone.model.eval(), backbone.tokenizer
    reference = backbone_reference(model)
    train_ids, held_out_ids = (
        token_stream(texts, tokenizer, watcher.progress) for texts in (text.train_texts, text.held_out_texts)
    )
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length, "seed": settings.seed}
    batches = Batches(train_ids, **shape)
    needed = settings.steps * settings.batch_size * settings.sequence_length
    num_trained = max(min(needed, int(MOST_NOT_COUNTED * len(train_ids))), settings.sequence_length)
    to_count_T, not_counted = train_ids[:-num_trained], Batches(train_ids[-num_trained:], **shape)
    held_out_BT = Batches(held_out_ids, **shape).sample(settings.eval_sequences)
    with watcher.progress("the model writes texts of its own", SAMPLES * SAMPLE_TOKENS) as advance:
        samples_BT = own_samples(model, held_out_BT[:, 0].repeat(SAMPLES)[:SAMPLES], num_tokens=SAMPLE_TOKENS)
        advance(samples_BT.numel())
    prompts_BT = held_out_BT[np.linspace(0, len(held_out_BT) - 1, PROMPTS).astype(int), :PROMPT_TOKENS]

    storage_path, shadow_map_path = map(str, memory_paths(staging))
    tokenizer_name = backbone.tokenizer_name
    engram = dataclasses.replace(
        engram, storage_path=storage_path, shadow_map_path=shadow_map_path, tokenizer_name=tokenizer_name
    )
    EngramTokenizerBuilder(tokenizer, engram.normalization).build_mapping(shadow_map_path)
    watcher.timing()
    step_times = _step_times(model, tokenizer, own_table("step_times", engram, staging), batches, settings)
    runs: dict[str, dict[str, Any]] = {}
    losses_of: dict[str, np.ndarray[Any, Any]] = {}
    written: dict[str, list[str]] = {}
    text_bytes = count_text_bytes(held_out_BT[:, 1:], tokenizer)

    def measure(name: str, learner: PreTrainedModel, steps: int, seconds: float) -> None:
        way, lost = WAYS[name], None
        if name != "untouched":
            lost = dataclasses.asdict(damage(learner, partial(untouched, learner), samples_BT))
        losses_BT = token_losses(learner, held_out_BT)
        losses_of[name] = losses_BT.mean(1).numpy()
        found = Evaluation(float(losses_BT.mean()), losses_BT.numel(), text_bytes)
        counts = trainable_parameters(learner) if steps else {"fusion": 0, "backbone": 0}
        runs[name] = {
            "label": way.label,
            "description": way.description,
            "steps": steps,
            "seconds": seconds,
            "damage": lost,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "trained": {"fusion": counts["fusion"], "lora": counts["backbone"]},
        }
        written[name] = continuations(learner, prompts_BT, tokenizer)

    for name, way in WAYS.items():
        if name == "counted" or (name in ("both", "random_rows") and not controls):
            continue
        own = dataclasses.replace(settings, lora_rank=LORA_RANK if way.has_lora else 0)
        if name == "lora":
            # A step's time is measured in turns, so that the memory's seconds are those of this LoRA's steps.
            counting = runs["counted"]["seconds"] / step_times["seconds"]["lora"]["median"]
            own.steps = max(1, round(settings.steps * step_times["ratio"] + counting))
        # The memory itself trains where it is saved.
        memory = engram if name == "memory" else own_table(name, engram, staging) if way.has_memory else None
        torch.manual_seed(settings.seed)
        with adapted(model, memory, own.lora_rank, tokenizer) as learner:
            seconds, text_to_learn = 0.0, batches
            if name == "random_rows":
                freeze_rows(memory_of(model))
            elif way.has_memory:
                counted = count_rows(model, to_count_T, progress=watcher.progress)
                seconds, text_to_learn = counted.seconds, not_counted
                if name == "memory":
                    measure("counted", learner, 0, seconds)
            if name == "untouched":
                measure(name, learner, 0, 0.0)
            else:
                with watcher.training(way.label, own) as on_step:
                    history = fit(learner, text_to_learn, own, on_step=on_step)
                measure(name, learner, own.steps, seconds + history.seconds[-1])
            if name == "memory":
                table = _table(model, engram)
                reading = memory_of(model).storage.stats().summary()
                evaluation = {f"perplexity, {WAYS[which].label}": runs[which]["perplexity"] for which in runs}
                training = {"corpus": text.name, "steps": own.steps, "trained": "memory", "seed": own.seed}
                save_pretrained(
                    model,
                    staging,
                    tokenizer=tokenizer,
                    backbone=reference,
                    training={**training, "tokens counted": counted.tokens},
                    evaluation={"held-out files": len(text.held_out_texts), **evaluation},
                    name="model",
                )
        if memory is not None and name != "memory":
            shutil.rmtree(staging / name)
    return {
        "title": "What does memory add to a model that has learned something?",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "corpus": {
            "name": text.name,
            "files": len(text.train_texts),
            "held_out_files": len(text.held_out_texts),
            "tokens": len(train_ids),
            "held_out_tokens": held_out_BT.numel(),
        },
        "model": {
            "name": backbone.name,
            "type": model.config.model_type,
            "layers": model.config.get_text_config().num_hidden_layers,
            "hidden_size": model.config.get_text_config().hidden_size,
            "parameters": model.num_parameters(),
        },
        "engram": engram.to_dict(),
        "train": settings.to_dict(),
        "table": table,
        "reading": reading,
        "runs": runs,
        "changes": {
            f"{one} - {other}": _change(losses_of[one] - losses_of[other], settings.seed)
            for one, other in (
                ("counted", "untouched"),
                ("memory", "untouched"),
                ("counted", "lora"),
                ("memory", "lora"),
                ("both", "lora"),
            )
            if one in runs
        },
        "random_rows_keep": _kept(runs) if "random_rows" in runs else None,
        "step_times": step_times,
        "generations": [
            {"prompt": tokenizer.decode(prompt_T), **{name: texts[at] for name, texts in written.items()}}
            for at, prompt_T in enumerate(prompts_BT.tolist())
        ],
        "machine": machine(),
    }


def _step_times(
    model: PreTrainedModel, tokenizer: Any, memory: EngramConfig, batches: Batches, settings: TrainConfig
) -> dict[str, Any]:
    """What a step takes with a memory, of what it takes with a LoRA: measured in turns, on copies."""
    with torch.random.fork_rng(), ExitStack() as both:
        learners = {
            "lora": both.enter_context(adapted(copy.deepcopy(model), None, LORA_RANK, tokenizer)),
            "memory": both.enter_context(adapted(copy.deepcopy(model), memory, 0, tokenizer)),
        }
        found = compare_steps(
            learners, batches, settings, rounds=STEP_TIME_ROUNDS, block_steps=BLOCK_STEPS, base="lora", other="memory"
        )
    shutil.rmtree(Path(memory.paths()[0]).parent)
    return found


def _change(differences_B: np.ndarray[Any, Any], seed: int) -> dict[str, float]:
    """The mean difference of two ways' losses over sequences, each compared with itself, and its interval."""
    low, high = paired_bootstrap(differences_B, resamples=RESAMPLES, seed=seed)
    return {"mean": float(differences_B.mean()), "low": low, "high": high}


def _kept(runs: dict[str, dict[str, Any]]) -> float:
    gain = runs["untouched"]["loss"] - runs["memory"]["loss"]
    return (runs["untouched"]["loss"] - runs["random_rows"]["loss"]) / gain if gain else float("nan")


def _table(model: PreTrainedModel, config: EngramConfig) -> dict[str, Any]:
    storage = memory_of(model).storage
    return {
        "rows": storage.num_embeddings,
        "width": storage.embedding_dim,
        "dtype": config.dtype,
        "bytes": storage.path.stat().st_size,
        "layers": config.layer_indices,
    }
