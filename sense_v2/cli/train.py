"""`sense-engram train`: a model, with memory or without, trained on a corpus and saved to a folder.

    corpus ──▶ backbone, tokenizer, shadow map ──▶ memory attached in the folder ──▶ steps ──▶ the folder, whole

The folder is one that `eval`, `generate`, `serve` and `from_pretrained` take. Nothing appears in it before everything
is there. What a run needs to go on lies beside it until it has taken all its steps (`staging.py`, `resume.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedModel

from sense_v2.cli.errors import one_line
from sense_v2.cli.models import (
    Backbone,
    max_positions,
    named_backbone,
    new_backbone,
    open_corpus,
    separator_id,
    token_stream,
)
from sense_v2.cli.progress import TrainingProgress
from sense_v2.cli.staging import RUN_FILE, STATE_FOLDER, reserve, resumed_folder, staged_folder
from sense_v2.core.config import Config, EngramConfig, TrainConfig
from sense_v2.core.errors import CommandError
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.hf.attach import attach_engram, decoder_layers
from sense_v2.hf.data.corpus import Batches, Corpus, find_files
from sense_v2.hf.data.large_corpus import is_hub_dataset
from sense_v2.hf.data.streaming import PackedStream, StreamBatches
from sense_v2.hf.insight.evaluation import Evaluation, evaluate
from sense_v2.hf.memory import EngramMemory, attached_memory, memory_of
from sense_v2.hf.saving.backbone_facts import backbone_facts
from sense_v2.hf.saving.folder import memory_paths
from sense_v2.hf.saving.model_card import CARD_FILE
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.fresh_model import small_memory
from sense_v2.hf.training.plain_loop import History, train
from sense_v2.hf.training.resume import Resumable, load_step, resumable_step, save_step
from sense_v2.report import wording

DEFAULT_OUTPUT = "runs/train"


def default_config(model: str | None) -> Config:
    """What a run without a configuration file uses: the demo's memory; a backbone that has learned something moves
    slower than a fresh one."""
    return Config(
        small_memory(DEFAULT_OUTPUT),
        TrainConfig() if model is None else TrainConfig(learning_rate=1e-4, fusion_learning_rate=1e-3),
    )


@dataclasses.dataclass
class Run:
    """How a run was called: what it needs to go on."""

    config: Config
    model: str | None = None
    corpus: list[str] | None = None
    text_column: str = "text"
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
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return cls(**{**values, "config": Config.from_dict(values["config"])})


def run_train(
    config: Config,
    *,
    model: str | None = None,
    corpus: Sequence[str | Path] | None = None,
    text_column: str = "text",
    output: str | Path = DEFAULT_OUTPUT,
    force: bool = False,
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Trains and saves; returns what it found, one dictionary that JSON can hold.

    `model` is a hub name or a folder, None a small fresh Llama. `corpus` are files and folders, or the name of a
    dataset on the hub; documents have their text in `text_column`. The paths in `config.engram` don't count: the
    memory lies in `output`. A first SIGINT (Ctrl-C) ends training after the step at hand, and what was trained is
    saved. A run that was stopped, killed, or failed after a checkpoint (each `commit_every` steps) goes on with
    `resume_train`.

    Raises `CommandError`, and what reading, attaching and training raise.
    """
    named = (
        None if not corpus else [str(Path(path).resolve()) if Path(path).exists() else str(path) for path in corpus]
    )
    run = Run(config, model, named, text_column)
    output = Path(output)
    with staged_folder(output, force=force) as staging:
        result, memory = _train(run, staging, output, resumes=False, echo=echo)
    return _finished(result, memory, echo)


def resume_train(output: str | Path = DEFAULT_OUTPUT, *, echo: Callable[[str], Any] = print) -> dict[str, Any]:
    """Goes on with the run in `output` that was stopped, killed, or failed, with the settings that it began with; its
    steps, weights, rows and result are those of a run that nothing happened to, bit for bit.

    Raises `CommandError` where there is none, or its model or corpus is another one by now.
    """
    output = Path(output)
    with resumed_folder(output) as staging:
        result, memory = _train(Run.load(staging / STATE_FOLDER), staging, output, resumes=True, echo=echo)
    return _finished(result, memory, echo)


def _train(
    run: Run, staging: Path, output: Path, *, resumes: bool, echo: Callable[[str], Any]
) -> tuple[dict[str, Any], EngramMemory | None]:
    """What `run_train` returns, and the memory, still open; the model is in `staging`, whole."""
    started = time.perf_counter()
    config, state_folder = run.config, staging / STATE_FOLDER
    text = open_corpus(run.corpus, config.train, text_column=run.text_column)
    echo(f"corpus   {_corpus_line(text)}")
    backbone = _backbone(run.model, text, config.train)
    batches, held_out_BT = _batches(text, backbone, config.train, echo)
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
    if config.engram.enabled:
        if not resumes:
            builder = EngramTokenizerBuilder(backbone.tokenizer, config.engram.normalization)
            builder.tokenizer_name = config.engram.tokenizer_name
            builder.build_mapping(config.engram.shadow_map_path)
        attach_engram(backbone.model, config.engram, backbone.tokenizer if resumes else None)
    for line in _description(backbone, config):
        echo(line)
    reserved = reserve(staging, _weight_bytes(backbone.model), output)

    evaluations: list[Evaluation] = []

    def check(model: PreTrainedModel) -> Evaluation:
        evaluations.append(evaluate(model, held_out_BT, tokenizer=backbone.tokenizer))
        return evaluations[-1]

    check(backbone.model)  # at resuming too: the memory that was just attached adds nothing yet
    checkpoints = _Checkpoints(state_folder, backbone.model, batches, output)
    with StopOnInterrupt() as stop:
        with TrainingProgress("train", config.train, echo=echo) as progress:
            history = train(
                backbone.model,
                batches,
                config.train,
                evaluate=check,
                on_step=progress,
                should_stop=stop.asked,
                resume=checkpoints.load if resumes else None,
                before_commit=checkpoints.save,
            )
        if history.stopped:
            check(backbone.model)
        reserved.unlink()
        _save(backbone, staging, output, *_card_facts(history, config.train, text, evaluations))
    _in_place(config, output).save(staging / "config.yaml")
    if not history.stopped:
        shutil.rmtree(state_folder)
    result = {
        "output": str(output),
        "model": backbone.name,
        "corpus": {
            "name": text.name,
            "files": _num_files(text),
            "held_out_files": len(text.held_out_texts),
            "files_left_out": text.files_left_out,
        },
        "memory": _memory_facts(backbone.model, config) if config.engram.enabled else None,
        **_training_facts(history, config.train),
        "perplexity": {"before": evaluations[0].perplexity, "after": evaluations[-1].perplexity},
        "bits_per_byte": {"before": evaluations[0].bits_per_byte, "after": evaluations[-1].bits_per_byte},
        "seconds": time.perf_counter() - started,
    }
    return result, attached_memory(backbone.model)


def _finished(result: dict[str, Any], memory: EngramMemory | None, echo: Callable[[str], Any]) -> dict[str, Any]:
    if memory is not None:
        # Whoever calls this may go on, and the table is anyone's to write from here.
        memory.storage.close()
    before, after = (wording.perplexity(result["perplexity"][when]) for when in ("before", "after"))
    echo(f"held-out perplexity {before} before, {after} after {result['steps']} steps")
    echo(f"saved    {result['output']}")
    return result


class _Checkpoints:
    """The run's state in its folder, as `train` asks for it."""

    def __init__(self, folder: Path, model: PreTrainedModel, batches: Resumable, output: Path) -> None:
        self.folder, self.model, self.batches, self.output = folder, model, batches, output

    def save(self, optimizers: Sequence[torch.optim.Optimizer], history: History) -> None:
        if not history.steps:
            return
        try:
            save_step(self.folder, self.model, optimizers, history, self.batches)
        except Exception as error:  # safetensors' own, or the system's
            raise CommandError(
                f"{self.output}: the trained model can't be written, its checkpoint after step {len(history.steps)}: "
                f"{one_line(str(error))}",
                "make room there, or choose another --output; --resume goes on from the checkpoint before, if any",
            ) from error

    def load(self, optimizers: Sequence[torch.optim.Optimizer]) -> History:
        step = resumable_step(self.folder, self.model)
        if step is None:
            raise CommandError(
                f"{self.output}: the run ended before its first checkpoint, so there is nothing to go on from",
                f"remove {self.folder.parent}, and train again without --resume",
            )
        try:
            return load_step(self.folder, step, self.model, optimizers, self.batches)
        except ValueError as error:
            raise CommandError(
                f"{self.output}: the run can't go on: {one_line(str(error))}",
                "bring the corpus back as it was, or start over with --force",
            ) from error


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
) -> tuple[Batches | StreamBatches, torch.Tensor]:
    """What is trained on, and held_out_BT."""
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length, "seed": settings.seed}
    found = []
    parts = [("text to train on", text.train_texts), ("held-out text", text.held_out_texts)]
    for name, texts in parts if text.documents is None else parts[1:]:
        token_ids = token_stream(texts, backbone.tokenizer, echo=echo)
        if len(token_ids) < settings.sequence_length:
            raise CommandError(
                f"corpus {text.name}: the {name} has {len(token_ids)} tokens, less than one sequence of "
                f"{settings.sequence_length}",
                "more text, or a shorter --sequence-length",
            )
        found.append(Batches(token_ids, **shape))
    held_out_BT = found[-1].sample(settings.eval_sequences)
    if text.documents is None:
        return found[0], held_out_BT
    stream = PackedStream(
        text.documents,
        backbone.tokenizer,
        sequence_length=settings.sequence_length,
        separator_id=separator_id(backbone.tokenizer),
        text_column=text.text_column,
        seed=settings.seed,
    )
    return StreamBatches(stream, batch_size=settings.batch_size), held_out_BT


def _text_digest(run: Run, text: Corpus, held_out_BT: torch.Tensor) -> str:
    digest = hashlib.sha256(held_out_BT.numpy().tobytes())
    if text.documents is not None and run.corpus is not None and not is_hub_dataset(run.corpus):
        for file in sorted(find_files([Path(path) for path in run.corpus])):
            digest.update(f"{file} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _num_files(text: Corpus) -> int | None:
    """How many files are trained on; None where it isn't known, of a corpus that is read while it is trained on."""
    return len(text.train_texts) if text.documents is None else None


def _corpus_line(text: Corpus) -> str:
    if text.documents is None:
        return f"{text.name}, {len(text.train_texts)} files, and {len(text.held_out_texts)} held out"
    return f"{text.name}, read while it trains; {len(text.held_out_texts)} held-out texts to evaluate on"


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
        "files": _num_files(text),
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
