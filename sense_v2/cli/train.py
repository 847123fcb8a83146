"""`sense-engram train`: a model, with memory or without, trained on a corpus and saved to a folder.

    corpus ──▶ backbone, tokenizer, shadow map ──▶ memory attached in the folder ──▶ steps ──▶ the folder, whole

The folder is one that `eval`, `generate`, `serve` and `from_pretrained` take. Nothing appears in it before everything
is there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedModel

from sense_v2.cli.errors import CommandError, one_line
from sense_v2.cli.models import Backbone, max_positions, named_backbone, new_backbone, open_corpus, token_stream
from sense_v2.cli.progress import TrainingProgress
from sense_v2.cli.staging import reserve, staged_folder
from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram, decoder_layers, memory_of
from sense_v2.hf.card import CARD_FILE
from sense_v2.hf.corpus import Batches, Corpus
from sense_v2.hf.evaluation import Evaluation, evaluate
from sense_v2.hf.fresh import small_memory
from sense_v2.hf.pretrained import memory_paths, save_pretrained
from sense_v2.hf.training import History, train
from sense_v2.report import wording

DEFAULT_OUTPUT = "runs/train"


def default_config(model: str | None) -> Config:
    """What a run without a configuration file uses: the demo's memory; a backbone that has learned something moves
    slower than a fresh one."""
    return Config(
        small_memory(DEFAULT_OUTPUT),
        TrainConfig() if model is None else TrainConfig(learning_rate=1e-4, fusion_learning_rate=1e-3),
    )


def run_train(
    config: Config,
    *,
    model: str | None = None,
    corpus: Sequence[str | Path] | None = None,
    output: str | Path = DEFAULT_OUTPUT,
    force: bool = False,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Trains and saves; returns what it found, one dictionary that JSON can hold.

    `model` is a hub name or a folder, None a small fresh Llama. The paths in `config.engram` don't count: the memory
    lies in `output`. A first SIGINT (Ctrl-C) ends training after the step at hand, and what was trained is saved.

    Raises `CommandError`, and what reading, attaching and training raise.
    """
    started = time.perf_counter()
    output = Path(output)
    with staged_folder(output, force=force) as staging:
        text = open_corpus(corpus, config.train)
        echo(f"corpus   {text.name}, {len(text.train_texts)} files, and {len(text.held_out_texts)} held out")
        backbone = _backbone(model, text, config.train)
        batches, held_out_BT = _batches(text, backbone, config.train, echo)
        config = dataclasses.replace(config, engram=_engram_config(config.engram, backbone, staging))
        if config.engram.enabled:
            builder = EngramTokenizerBuilder(backbone.tokenizer, config.engram.normalization)
            builder.tokenizer_name = config.engram.tokenizer_name
            builder.build_mapping(config.engram.shadow_map_path)
            attach_engram(backbone.model, config.engram)
        for line in _description(backbone, config):
            echo(line)
        reserved = reserve(staging, _weight_bytes(backbone.model), output)

        evaluations: list[Evaluation] = []

        def check(model: PreTrainedModel) -> Evaluation:
            evaluations.append(evaluate(model, held_out_BT, tokenizer=backbone.tokenizer))
            return evaluations[-1]

        check(backbone.model)
        with StopOnInterrupt() as stop:
            with TrainingProgress("train", config.train, echo=echo) as progress:
                history = train(
                    backbone.model, batches, config.train, evaluate=check, on_step=progress, should_stop=stop.asked
                )
            if history.stopped:
                check(backbone.model)
            reserved.unlink()
            _save(backbone, staging, output, *_card_facts(history, config.train, text, evaluations))
        _in_place(config, output).save(staging / "config.yaml")
    result = {
        "output": str(output),
        "model": backbone.name,
        "corpus": {
            "name": text.name,
            "files": len(text.train_texts),
            "held_out_files": len(text.held_out_texts),
            "files_left_out": text.files_left_out,
        },
        "memory": _memory_facts(backbone.model, config) if config.engram.enabled else None,
        **_training_facts(history, config.train),
        "perplexity": {"before": evaluations[0].perplexity, "after": evaluations[-1].perplexity},
        "bits_per_byte": {"before": evaluations[0].bits_per_byte, "after": evaluations[-1].bits_per_byte},
        "seconds": time.perf_counter() - started,
    }
    if config.engram.enabled:
        # Whoever calls this may go on, and the table is anyone's to write from here.
        memory_of(backbone.model).storage.close()
    before, after = (wording.perplexity(evaluations[which].perplexity) for which in (0, -1))
    echo(f"held-out perplexity {before} before, {after} after {result['steps']} steps")
    echo(f"saved    {output}")
    return result


class StopOnInterrupt:
    """While it lasts, a first SIGINT sets `asked()`, and a second raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> StopOnInterrupt:
        # Signals are the main thread's; a run in the background, which ignores SIGINT, keeps ignoring it.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # Not print: a signal can arrive in the middle of one.
        os.write(2, b"\nstopping after this step, then saving; Ctrl-C again quits at once, without saving\n")


def _backbone(model: str | None, text: Corpus, settings: TrainConfig) -> Backbone:
    if model is None:
        return new_backbone(text.train_texts, text.name, seed=settings.seed, sequence_length=settings.sequence_length)
    backbone = named_backbone(model)
    limit = max_positions(backbone.model)
    if limit is not None and settings.sequence_length > limit:
        raise CommandError(
            f"sequence_length = {settings.sequence_length}, but {model} takes {limit} tokens at most",
            f"--sequence-length {limit}, or less",
        )
    return backbone


def _batches(
    text: Corpus, backbone: Backbone, settings: TrainConfig, echo: Callable[[str], Any]
) -> tuple[Batches, Any]:
    """What is trained on, and held_out_BT."""
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length, "seed": settings.seed}
    found = []
    for name, texts in (("text to train on", text.train_texts), ("held-out text", text.held_out_texts)):
        token_ids = token_stream(texts, backbone.tokenizer, echo=echo)
        if len(token_ids) < settings.sequence_length:
            raise CommandError(
                f"corpus {text.name}: the {name} has {len(token_ids)} tokens, less than one sequence of "
                f"{settings.sequence_length}",
                "more text, or a shorter --sequence-length",
            )
        found.append(Batches(token_ids, **shape))
    return found[0], found[1].sample(settings.eval_sequences)


def _engram_config(config: EngramConfig, backbone: Backbone, staging: Path) -> EngramConfig:
    storage_path, shadow_map_path = memory_paths(staging)
    return dataclasses.replace(
        config,
        storage_path=str(storage_path),
        shadow_map_path=str(shadow_map_path),
        tokenizer_name=config.tokenizer_name or backbone.tokenizer_name,
    )


def _save(
    backbone: Backbone, staging: Path, output: Path, training: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    try:
        if (output / CARD_FILE).is_file():  # a person's own stays
            shutil.copyfile(output / CARD_FILE, staging / CARD_FILE)
        save_pretrained(
            backbone.model,
            staging,
            tokenizer=backbone.tokenizer,
            training=training,
            evaluation=evaluation,
            name=output.resolve().name,
        )
    except Exception as error:  # of three libraries, each with its own; the paths they name are gone by then
        raise CommandError(
            f"{output}: the trained model can't be written: {one_line(str(error))}",
            "make room there, or choose another --output, and train again",
        ) from error


def _card_facts(
    history: History, settings: TrainConfig, text: Corpus, evaluations: list[Evaluation]
) -> tuple[dict[str, Any], dict[str, Any]]:
    facts = _training_facts(history, settings)
    training = {
        "corpus": text.name,
        "files": len(text.train_texts),
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


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _training_facts(history: History, settings: TrainConfig) -> dict[str, Any]:
    steps = len(history.steps)
    tokens = steps * settings.batch_size * settings.sequence_length
    seconds = history.seconds[-1] if steps else 0.0
    return {
        "stopped": history.stopped,
        "steps": steps,
        "tokens": tokens,
        "train_loss": history.train_loss[-1] if steps else None,
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def _memory_facts(model: PreTrainedModel, config: Config) -> dict[str, Any]:
    storage = memory_of(model).storage
    return {
        "rows": storage.num_embeddings,
        "width": storage.embedding_dim,
        "dtype": config.engram.dtype,
        "bytes": storage.num_embeddings * storage.embedding_dim * storage.dtype.itemsize,
        "heads": config.engram.total_heads,
        "layers": config.engram.layer_indices,
    }


def _description(backbone: Backbone, config: Config) -> list[str]:
    model = backbone.model
    layers = len(decoder_layers(model))
    parameters = sum(value.numel() for name, value in model.named_parameters() if not name.startswith("engram."))
    lines = [
        f"model    {backbone.name}, {layers} layers of width {model.config.get_text_config().hidden_size}, "
        f"{wording.short(parameters)} parameters{'' if config.train.train_backbone else ', frozen'}"
    ]
    if config.engram.enabled:
        facts = _memory_facts(model, config)
        lines.append(
            f"memory   {wording.count(facts['rows'])} rows × {facts['width']} {facts['dtype']} "
            f"({wording.size(facts['bytes'])}) before layer "
            f"{wording.listing([str(layer) for layer in facts['layers']])}, {facts['heads']} heads"
        )
    return lines
