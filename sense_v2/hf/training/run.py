"""A whole run: a corpus and a model's name -> a folder with the trained model.

    corpus ──▶ backbone, tokenizer, shadow map ──▶ memory attached in the folder ──▶ steps ──▶ the folder, whole

`from_pretrained` and the commands open the folder. Nothing appears in it before everything is there. What a run needs
to go on lies beside it until it has taken all its steps (`hf/saving/staged_folder.py`).

Long because a run is one story: what it begins with, what a resumed one compares, and what it saves and says at its
end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.core.errors import CommandError, number_of, one_line
from sense_v2.core.folders import refuse_other_encodings
from sense_v2.core.progress import Progress, no_progress
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.adapters import with_lora
from sense_v2.hf.attach import attach_engram, decoder_layers, detach_engram
from sense_v2.hf.backbones import Backbone, max_positions, named_backbone, new_backbone, separator_id, token_stream
from sense_v2.hf.data.corpus import Batches, Corpus
from sense_v2.hf.data.corpus_files import find_files
from sense_v2.hf.data.held_out import absolute_paths, save_corpus
from sense_v2.hf.data.large_corpus import open_corpus
from sense_v2.hf.data.streaming import STREAM_FILE, PackedStream, StreamBatches, is_hub_dataset
from sense_v2.hf.insight.damage import Damage, damage, own_samples, untouched
from sense_v2.hf.insight.evaluation import Evaluation, evaluate
from sense_v2.hf.load import load_fusion
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of, trainable_parameters
from sense_v2.hf.saving.backbone_facts import backbone_facts, backbone_reference
from sense_v2.hf.saving.folder import MEMORY_FOLDER, memory_paths, weights_in
from sense_v2.hf.saving.model_card import CARD_FILE
from sense_v2.hf.saving.save import save_adapter, save_memory, save_pretrained
from sense_v2.hf.saving.staged_folder import (
    RUN_FILE,
    STATE_FOLDER,
    remove_state,
    reserve,
    resumed_folder,
    staged_folder,
)
from sense_v2.hf.training.counted_rows import Counted, count_rows
from sense_v2.hf.training.fit import History, fit, resumable_checkpoint
from sense_v2.hf.training.fresh_model import late_memory_for, memory_for, small_memory
from sense_v2.hf.training.settings import checked_trainer

DEFAULT_OUTPUT = "runs/train"
# Enough for the damage's first digit, in seconds.
DAMAGE_SEQUENCES, DAMAGE_TOKENS = 16, 1024
MOST_NOT_COUNTED = 0.25
"""Of the text: what is left out of the count, to be trained on."""
COUNTED_ROW_RATE = 0.03
"""A tenth of what suits rows of zeros, which forgets what was counted (benchmarks/LOG.md)."""


class RunWatcher:
    """What a run tells while it goes on. Each method does nothing by itself."""

    progress: Progress = staticmethod(no_progress)

    def corpus_opened(self, corpus: Corpus) -> None:
        """Called before anything is read of the text to train on."""

    def counted(self, counted: Counted) -> None:
        """Called when the rows were counted."""

    def prepared(self, facts: dict[str, Any]) -> None:
        """Called before the first step, with what will be trained: `model` and `memory` of the result."""

    @contextmanager
    def training(self, settings: TrainConfig) -> Iterator[tuple[Callable[[History], Any] | None, Callable[[], bool]]]:
        """Give `on_step` and `should_stop` of `fit`, as a context around the training."""
        yield None, lambda: False


@dataclasses.dataclass
class Run:
    """How a run was called: what it needs to go on."""

    config: Config
    model: str | None = None
    corpus: list[str] | None = None
    text_column: str = "text"
    suits_model: bool = False
    counts: bool = False
    counted: dict[str, Any] | None = None
    """What `count_rows` did, once it has."""
    weights: str | None = None
    """A digest of the backbone that it began with,"""
    text: str | None = None
    """and of the held-out text, and the sizes of files that are read while it trains."""

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        values = {**dataclasses.asdict(self), "config": self.config.to_dict()}
        (folder / RUN_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Run:
        file = folder / RUN_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "config": Config.from_dict(values["config"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CommandError(
                f"{file} isn't what a run wrote there: {one_line(str(error))}", "train again without --resume"
            ) from error


def default_config(model: str | None, lora_rank: int = 0, *, counts: bool = False) -> Config:
    """Return what a run without a configuration file uses: the demo's memory; a backbone that has learned something
    moves slower than a fresh one, and slower than an adapter; counted rows slower than zeros."""
    if model is None:
        return Config(small_memory(DEFAULT_OUTPUT), TrainConfig())
    rates: dict[str, Any] = dict.fromkeys(("fusion_learning_rate", "value_learning_rate"), 3e-3)
    rates |= {"learning_rate": 3e-3 if lora_rank else 1e-4, "row_learning_rate": COUNTED_ROW_RATE if counts else 0.3}
    return Config(small_memory(DEFAULT_OUTPUT), TrainConfig(**rates))


def train_on_corpus(
    config: Config,
    *,
    model: str | None = None,
    corpus: Sequence[str | Path] | None = None,
    text_column: str = "text",
    output: str | Path = DEFAULT_OUTPUT,
    force: bool = False,
    suits_model: bool = False,
    counts: bool = False,
    watcher: RunWatcher | None = None,
) -> dict[str, Any]:
    """Train and save.

    The weights of a backbone that stays as it is (`train_backbone` False, or a LoRA) aren't saved, but named.

    Args:
        config: Memory and training. Its paths don't count: the memory lies in `output`.
        model: A hub name or a folder; None is a small fresh Llama. A folder that this or `save_pretrained` wrote has
            a memory: a copy of it is trained further, with its own settings in place of `config.engram`.
        corpus: Files and folders, or the name of a dataset on the hub; None is the Python standard library.
        text_column: Where documents have their text.
        output: The model's folder.
        force: Whether a model that is there is replaced.
        suits_model: Whether layers, width and heads of the memory are chosen by the model's shape (`memory_for`, or
            `late_memory_for` where rows are counted).
        counts: Whether the rows are counted first (`count_rows`), from text that is then not trained on.
        watcher: What the run tells while it goes on, and who may stop it. A run that was stopped is saved, and one
            that was stopped, killed, or failed after a checkpoint goes on with `resume_training`.

    Returns:
        What it found, one dictionary that JSON can hold.

    Raises:
        CommandError: What was asked for can't be done. What reading, attaching and training raise comes as it is.
    """
    checked_trainer(config.trainer)
    refuse_other_encodings(output, Path(output).resolve(), model)
    if config.train.lora_rank and model is None:
        raise CommandError(
            f"lora_rank = {config.train.lora_rank}: a fresh model has learned nothing that an adapter goes on from",
            "name a model with --model, or leave it out",
        )
    if not config.train.steps and not counts:
        raise CommandError("steps = 0, and no rows are counted: nothing would be learned", "more --steps")
    run = Run(config, model, absolute_paths(corpus), text_column, suits_model=suits_model, counts=counts)
    with staged_folder(Path(output), force=force) as staging:
        result, memory = _train(run, staging, Path(output), watcher or RunWatcher(), resumes=False)
    return _closed(result, memory)


def resume_training(output: str | Path = DEFAULT_OUTPUT, *, watcher: RunWatcher | None = None) -> dict[str, Any]:
    """Go on with the run in `output` that was stopped, killed, or failed, with the settings that it began with.

    Its steps, weights, rows and result are those of a run that nothing happened to, bit for bit. Raises
    `CommandError` where there is none, or its model or corpus is another one by now.
    """
    refuse_other_encodings(output, Path(output).resolve())
    with resumed_folder(Path(output)) as staging:
        run = Run.load(staging / STATE_FOLDER)
        result, memory = _train(run, staging, Path(output), watcher or RunWatcher(), resumes=True)
    return _closed(result, memory)


def _closed(result: dict[str, Any], memory: EngramMemory | None) -> dict[str, Any]:
    if memory is not None:
        # Whoever calls this may go on, and the table is anyone's to write from here.
        memory.storage.close()
    return result


def _train(
    run: Run, staging: Path, output: Path, watcher: RunWatcher, *, resumes: bool
) -> tuple[dict[str, Any], EngramMemory | None]:
    """The result, and the memory, still open; the model is in `staging`, whole."""
    started = time.perf_counter()
    config, state_folder = run.config, staging / STATE_FOLDER
    too_early = CommandError(
        f"{output}: the run ended before its first checkpoint, so there is nothing to go on from",
        f"remove {staging}, and train again without --resume",
    )
    if resumes and not any(state_folder.glob(f"*/{STREAM_FILE}")):
        raise too_early
    text = open_corpus(run.corpus, config.train, text_column=run.text_column)
    watcher.corpus_opened(text)
    backbone = _backbone(run.model, text, config.train, watcher.progress)
    is_named = run.model is not None and (not config.train.train_backbone or config.train.lora_rank > 0)
    if backbone.trained is not None and weights_in(backbone.trained):
        is_named = False  # a folder with a memory is no place to name weights by
    reference = backbone_reference(backbone.model) if is_named else None
    if backbone.trained is not None:
        if not config.engram.enabled:
            raise CommandError(
                f"{run.model} has a memory, and this run is to have none", "name the model that it was made from"
            )
        config = dataclasses.replace(config, engram=memory_of(backbone.model).config)
    elif run.suits_model:
        suited = late_memory_for if run.counts else memory_for
        config = dataclasses.replace(config, engram=suited(backbone.model, config.engram))
    if run.counts:
        _refuse_count(config.engram, text, run, has_memory=backbone.trained is not None)
    to_count_T, batches, held_out_BT = _batches(text, backbone, config.train, watcher, counts=run.counts)
    config = dataclasses.replace(config, engram=_engram_config(config.engram, backbone, staging))
    began = dataclasses.replace(
        run, weights=backbone_facts(backbone.model)["weights"], text=_text_digest(run, text, held_out_BT)
    )
    if not resumes:
        began.save(state_folder)
    for name, what in (("text", f"the corpus {text.name}"), ("weights", str(run.model or "the fresh model"))):
        if resumes and getattr(run, name) != getattr(began, name):
            raise CommandError(
                f"{what} isn't the one that the run began with",
                "bring it back as it was, or start over: --force, without --resume",
            )
    evaluations: list[Evaluation] = []

    def check(model: PreTrainedModel, progress: Progress = no_progress) -> Evaluation:
        with progress("measuring", held_out_BT.numel(), unit="tokens") as advance:
            evaluations.append(evaluate(model, held_out_BT, tokenizer=backbone.tokenizer, advance=advance))
        return evaluations[-1]

    if backbone.trained is not None:
        check(backbone.model, watcher.progress)
        _take_over_memory(backbone.model, config.engram, staging / MEMORY_FOLDER, resumes)
    elif config.engram.enabled:
        if not resumes:
            builder = EngramTokenizerBuilder(backbone.tokenizer, config.engram.normalization)
            builder.tokenizer_name = config.engram.tokenizer_name
            builder.build_mapping(config.engram.paths()[1])
        attach_engram(backbone.model, config.engram, backbone.tokenizer if resumes else None)
    model = with_lora(backbone.model, config.train.lora_rank)
    facts = _facts(backbone, config)
    watcher.prepared(facts)
    if resumes and resumable_checkpoint(state_folder, model) is None:
        raise too_early
    reserved = reserve(staging, _weight_bytes(model, reference is not None), output)

    if backbone.trained is None:
        check(model, watcher.progress)  # at resuming too: the memory that was just attached adds nothing yet
    if to_count_T is not None and not resumes:
        found = count_rows(backbone.model, to_count_T, progress=watcher.progress)
        began.counted = dataclasses.asdict(found)
        began.save(state_folder)
        watcher.counted(found)
    with watcher.training(config.train) as (on_step, should_stop):
        with _explained(output, resumes):
            history = fit(
                model,
                batches,
                config.train,
                trainer=config.trainer,
                evaluate=check,
                on_step=on_step,
                should_stop=should_stop,
                folder=state_folder,
                resumes=resumes,
            )
        check(
            model, watcher.progress
        )  # always: a run that is resumed at its last step has evaluated nothing on its way
        lost = None if reference is None else _damage(model, held_out_BT, watcher)
        reserved.unlink()
        cards = _card_facts(history, config.train, text, evaluations)
        _save(dataclasses.replace(backbone, model=model), staging, output, reference, *cards)
    save_corpus(staging, run.corpus, run.text_column)
    _in_place(config, output).save(staging / "config.yaml")  # last, and whole: see staged_folder
    if not history.stopped:
        remove_state(staging)
    result = {
        "output": str(output),
        "model": backbone.name,
        "corpus": {
            "name": text.name,
            "files": text.num_files,
            "held_out_files": len(text.held_out_texts),
            "files_left_out": text.files_left_out,
            "empty_documents": text.num_empty,
        },
        "memory": facts["memory"],
        "trainable": facts["trainable"],
        "counted": began.counted,
        **_training_facts(history, config.train),
        "perplexity": {"before": evaluations[0].perplexity, "after": evaluations[-1].perplexity},
        "bits_per_byte": {"before": evaluations[0].bits_per_byte, "after": evaluations[-1].bits_per_byte},
        "damage": None if lost is None else dataclasses.asdict(lost),
        "seconds": time.perf_counter() - started,
    }
    return result, attached_memory(backbone.model)


@contextmanager
def _explained(output: Path, resumes: bool) -> Iterator[None]:
    """Says of a checkpoint that can't be written or read what to do about it."""
    try:
        yield
    except (FloatingPointError, CommandError):
        raise
    except Exception as error:  # safetensors' own, torch's, or the system's
        text = one_line(str(error))
        if resumes and isinstance(error, ValueError):
            raise CommandError(
                f"{output}: the run can't go on: {text}",
                "bring the corpus back as it was, or start over with --force",
            ) from error
        if any(mark in text for mark in ("File too large", "No space left", "quota", "file write failed")):
            raise CommandError(
                f"{output}: the trained model can't be written, its checkpoint included: {text}",
                "make room there, or choose another --output; --resume goes on from the checkpoint before, if any",
            ) from error
        raise


def _backbone(model: str | None, text: Corpus, settings: TrainConfig, progress: Progress) -> Backbone:
    if model is None:
        shape: dict[str, Any] = {"seed": settings.seed, "sequence_length": settings.sequence_length}
        return new_backbone(text.train_texts, text.name, **shape, progress=progress)
    backbone = named_backbone(model, trained=True)
    limit = max_positions(backbone.model)
    if limit is not None and settings.sequence_length > limit:
        raise CommandError(
            f"sequence_length = {settings.sequence_length}, but {model} takes {limit} tokens at most",
            f"--sequence-length {limit}, or less",
        )
    torch.manual_seed(settings.seed)  # what fusion layers and an adapter begin with
    return backbone


def _refuse_count(engram: EngramConfig, text: Corpus, run: Run, *, has_memory: bool) -> None:
    """Say why rows can't be counted into this memory, before anything takes long."""
    found = None
    if run.model is None:
        found = "a fresh model's embeddings mean nothing yet"
    elif not engram.enabled:
        found = "this run is to have no memory"
    elif has_memory:
        found = f"{run.model} has a memory already, whose rows have learned"
    elif engram.init_std:
        found = f"init_std = {engram.init_std:g}, so the rows begin as noise"
    elif text.documents is not None:
        found = f"the corpus {text.name} is read while it is trained on"
    if found is not None:
        raise CommandError(f"rows can't be counted: {found}", "--begin-with zeros")


def _batches(
    text: Corpus, backbone: Backbone, settings: TrainConfig, watcher: RunWatcher, *, counts: bool = False
) -> tuple[np.ndarray[Any, Any] | None, Batches | StreamBatches, torch.Tensor]:
    """The text to count, if `counts`, what is trained on, and held_out_BT."""
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length, "seed": settings.seed}
    found: list[Batches] = []
    to_count_T = None
    parts = [("text to train on", text.train_texts), ("held-out text", text.held_out_texts)]
    for name, texts in parts if text.documents is None else parts[1:]:
        token_ids = token_stream(texts, backbone.tokenizer, watcher.progress)
        if len(token_ids) < settings.sequence_length:
            raise CommandError(
                f"corpus {text.name}: the {name} has {number_of(len(token_ids), 'token')}, less than one sequence of "
                f"{settings.sequence_length}",
                "more text, or a shorter --sequence-length",
            )
        if counts and not found:
            needed = settings.steps * settings.batch_size * settings.sequence_length
            num_trained = min(needed, int(MOST_NOT_COUNTED * len(token_ids)))
            num_trained = max(num_trained, settings.sequence_length)
            to_count_T, token_ids = token_ids[:-num_trained], token_ids[-num_trained:]
        found.append(Batches(token_ids, **shape))
    held_out_BT = found[-1].sample(settings.eval_sequences)
    if text.documents is None:
        return to_count_T, found[0], held_out_BT
    stream = PackedStream(
        text.documents,
        backbone.tokenizer,
        sequence_length=settings.sequence_length,
        separator_id=separator_id(backbone.tokenizer),
        text_column=text.text_column,
        seed=settings.seed,
    )
    return None, StreamBatches(stream, batch_size=settings.batch_size), held_out_BT


def _text_digest(run: Run, text: Corpus, held_out_BT: torch.Tensor) -> str:
    digest = hashlib.sha256(held_out_BT.numpy().tobytes())
    if text.documents is not None and run.corpus is not None and not is_hub_dataset(run.corpus):
        for file in sorted(find_files([Path(path) for path in run.corpus])):
            digest.update(os.fsencode(file) + f" {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _take_over_memory(model: PreTrainedModel, config: EngramConfig, folder: Path, resumes: bool) -> None:
    """Give a model, in place of the memory that it has to read, a copy in `folder` to train."""
    if not resumes:
        save_memory(memory_of(model), folder, table="copy", states=False)
    detach_engram(model)
    attach_engram(model, config)
    load_fusion(memory_of(model), folder)


def _engram_config(config: EngramConfig, backbone: Backbone, staging: Path) -> EngramConfig:
    storage_path, shadow_map_path = memory_paths(staging)
    return dataclasses.replace(
        config,
        storage_path=str(storage_path),
        shadow_map_path=str(shadow_map_path),
        tokenizer_name=config.tokenizer_name or backbone.tokenizer_name,
    )


def _save(
    backbone: Backbone,
    staging: Path,
    output: Path,
    reference: dict[str, Any] | None,
    training: dict[str, Any],
    evaluation: dict[str, Any],
) -> None:
    try:
        if (output / CARD_FILE).is_file():  # a person's own stays
            shutil.copyfile(output / CARD_FILE, staging / CARD_FILE)
        if isinstance(backbone.model, PreTrainedModel):
            save_pretrained(
                backbone.model,
                staging,
                tokenizer=backbone.tokenizer,
                backbone=reference,
                training=training,
                evaluation=evaluation,
                name=output.resolve().name,
            )
        else:
            save_adapter(backbone.model, staging, backbone.tokenizer, reference)
    except Exception as error:  # of three libraries, each with its own; the paths they name are gone by then
        raise CommandError(
            f"{output}: the trained model can't be written: {one_line(str(error))}",
            "make room there, or choose another --output, and train again",
        ) from error


def _damage(model: Any, held_out_BT: torch.Tensor, watcher: RunWatcher) -> Damage:
    """What the model with memory, and its adapter, lost of what the untouched one knew."""
    with watcher.progress("measuring what was lost", DAMAGE_TOKENS) as advance:
        first_ids_B = held_out_BT[:, 0].repeat(DAMAGE_SEQUENCES)[:DAMAGE_SEQUENCES]
        with untouched(model):
            samples_BT = own_samples(model, first_ids_B, num_tokens=DAMAGE_TOKENS // DAMAGE_SEQUENCES)
        found = damage(model, lambda: untouched(model), samples_BT)
        advance(found.tokens)
    return found


def _card_facts(
    history: History, settings: TrainConfig, text: Corpus, evaluations: list[Evaluation]
) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = _training_facts(history, settings)
    training = {
        "corpus": text.name,
        "files": text.num_files,
        "steps": facts["steps"],
        "tokens": facts["tokens"],
        "sequence length": settings.sequence_length,
        "batch size": settings.batch_size,
        "trained": "backbone and memory" if settings.train_backbone else "memory",
        "seed": settings.seed,
        "seconds": facts["train_seconds"],
    }
    evaluation: dict[str, Any] = {"held-out files": len(text.held_out_texts)}
    for when, one in (("before", evaluations[0]), ("after", evaluations[-1])):
        evaluation |= {f"perplexity {when}": one.perplexity, f"bits per byte {when}": one.bits_per_byte}
    return training, evaluation


def _in_place(config: Config, output: Path) -> Config:
    """The configuration with the paths that the memory has once it is saved."""
    storage_path, shadow_map_path = memory_paths(output)
    engram = dataclasses.replace(config.engram, storage_path=str(storage_path), shadow_map_path=str(shadow_map_path))
    return dataclasses.replace(config, engram=engram)


def _weight_bytes(model: Any, is_named: bool) -> int:
    """Of what will be saved: without the weights of a backbone that is named."""
    kept = {name for name, value in model.named_parameters() if value.requires_grad or not is_named}
    return sum(
        value.numel() * value.element_size()
        for name, value in model.state_dict().items()
        if name in kept or not is_named
    )


def _training_facts(history: History, settings: TrainConfig) -> dict[str, Any]:
    steps = history.num_steps
    tokens = steps * settings.batch_size * settings.sequence_length
    seconds = history.seconds[-1] if steps else 0.0
    return {
        "stopped": history.stopped,
        "steps": steps,
        "planned_steps": settings.steps,
        "tokens": tokens,
        "train_loss": history.train_loss[-1] if steps else None,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def _facts(backbone: Backbone, config: Config) -> dict[str, Any]:
    model, memory = backbone.model, None
    if config.engram.enabled:
        storage = memory_of(model).storage
        memory = {
            "rows": storage.num_embeddings,
            "width": storage.embedding_dim,
            "dtype": config.engram.dtype,
            "bytes": storage.num_embeddings * storage.embedding_dim * storage.dtype.itemsize,
            "heads": config.engram.total_heads,
            "layers": config.engram.layer_indices,
        }
    trainable = trainable_parameters(model)
    if not config.train.trains_beside_memory:
        trainable["backbone"] = 0
    return {
        "trainable": trainable,
        "model": {
            "name": backbone.name,
            "layers": len(decoder_layers(model)),
            "width": model.config.get_text_config().hidden_size,
            "parameters": sum(
                value.numel()
                for name, value in model.named_parameters()
                if not name.startswith("engram.") and ".lora_" not in name
            ),
            "trains": config.train.train_backbone and not config.train.lora_rank,
            "lora_rank": config.train.lora_rank,
        },
        "memory": memory,
    }
