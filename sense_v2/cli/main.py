"""`sense-engram`: the program, and the list of its commands.

`main` is the entry point. An error becomes two lines on stderr, what is wrong and the way out, and an exit status;
`sense-engram --debug COMMAND` shows its traceback first.

A command is its options, one call of the library, and what it prints. It is added in two places:

1. `cli/commands/`, in the file of what it is about: a function with its options, a docstring of one sentence and a
   line `Example: sense-engram NAME ...`, and `as_json: JsonOption = False` as the last option. It imports the library
   inside the function, so that `--help` and the shell's completion never load a model library. What takes more than
   two seconds shows how far it is (`progress_to`). An error that the user can mend is a `CommandError`, or another
   exception with its way out (`with_way_out`).
2. `COMMANDS` below: one line. `groups` makes typer commands of these functions, each when it is asked for.

tests/cli/test_commands.py walks through all commands and holds each to this.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from sense_v2 import __version__
from sense_v2.cli.commands import convert, corpora, deltas, insight, models, released, serving, tables
from sense_v2.cli.errors import FAILED, INTERRUPTED, WRONG_CALL, explain, one_line
from sense_v2.cli.groups import Entry, group
from sense_v2.cli.output import LOADING, tell

PROGRAM = "sense-engram"

# Under these headings and in this order they stand in the help. A name of two words is a command of a group.
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Train a model with memory, and use it": {
        "demo": models.demo,
        "train": models.train,
        "eval": models.evaluate,
        "generate": serving.generate,
        "serve": serving.serve,
    },
    "See what a memory does": {
        "analyze": insight.analyze,
        "ablate": insight.ablate,
        "play": serving.play,
    },
    "Make tables, and care for them": {
        "setup": tables.setup,
        "create": tables.create,
        "verify": tables.verify,
        "convert": convert.convert,
        "tokenize": corpora.tokenize,
        "profile": corpora.profile,
        "warm": tables.warm,
    },
    "Change rows by small files, and take them back: git for memory": {
        "delta teach": deltas.teach,
        "delta make-writable": deltas.make_writable,
        "delta export": deltas.export,
        "delta apply": deltas.apply,
        "delta revert": deltas.revert,
        "delta merge": deltas.merge,
        "delta withdraw": deltas.withdraw,
        "delta show": deltas.show,
    },
    "Look into tables that others have released": {
        "inspect": released.inspect,
        "lookup": released.lookup,
    },
}
GROUPS = {
    "delta": "Changed rows of a table, as small files: teach, make-writable, export, apply, revert, merge, withdraw, "
    "show."
}


def _nested(commands: dict[str, Callable[..., None]]) -> dict[str, Entry]:
    """Under their own names, those of two words in groups."""
    found: dict[str, Entry] = {}
    for name, function in commands.items():
        group_name = name.partition(" ")[0]
        if group_name == name:
            found[name] = function
        elif group_name not in found:
            inner = {of.partition(" ")[2]: one for of, one in commands.items() if of.startswith(f"{group_name} ")}
            found[group_name] = group(
                {"Commands": inner}, name=group_name, help=GROUPS[group_name], add_completion=False
            )
    return found


EXIT_STATUS = (
    f"Exit status: 0 done; {FAILED} failed, or verify found something wrong; {WRONG_CALL} a wrong call; "
    f"{INTERRUPTED} ended by Ctrl-C (train has saved what it had). Every failure is two lines on stderr: what is "
    "wrong, and the way out."
)

app = group(
    {heading: _nested(commands) for heading, commands in COMMANDS.items()},
    help="Conditional memory for Hugging Face language models, in memory-mapped files.",
    epilog=EXIT_STATUS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 300},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The libraries' own progress and advice; whoever wants it sets these variables.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars that don't say themselves whether they are shown; ours do
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    LOADING.begin()
    global_options: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            status = app(arguments, prog_name=PROGRAM, obj=global_options, standalone_mode=False)
            sys.stdout.flush()
        except typer.Abort:  # how a Ctrl-C arrives here depends on typer's version
            return INTERRUPTED
        except BrokenPipeError:  # whoever read the output has left, which typer notices too, but for the last lines
            # Python would complain once more at exit, when it writes what is left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except Exception as error:
            return _report(error, arguments, debug=bool(global_options.get("debug")))
        finally:
            LOADING.end()
    return status if isinstance(status, int) else 0


def _report(error: Exception, arguments: list[str], *, debug: bool) -> int:
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a wrong call, found by typer
        context = getattr(error, "ctx", None)
        command = context.command_path if context else PROGRAM
        what, way_out = one_line(error.format_message()).removesuffix("."), f"`{command} --help` lists what there is"
        status = WRONG_CALL
    else:
        names = [name for commands in COMMANDS.values() for name in commands]
        words = [word for word in arguments if not word.startswith("-")]
        command = " ".join([PROGRAM, *[name for name in names if words[: len(name.split())] == name.split()][:1]])
        what, way_out = explain(error, command)
        status = FAILED
        if debug:
            tell(*"".join(traceback.format_exception(error)).splitlines(), file=sys.stderr)
    tell(f"error: {what}", f" help: {way_out}", file=sys.stderr)
    return status


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    tell(f"note: {one_line(str(message))}", file=sys.stderr)


def _show_version(asked: bool) -> None:
    if asked:
        tell(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        # Eager, so that it ends the program before typer loads what converts other options' values.
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit."),
    ] = False,
) -> None:
    context.ensure_object(dict)["debug"] = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


if __name__ == "__main__":
    sys.exit(main())
