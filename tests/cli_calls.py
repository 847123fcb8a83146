"""Calls of `sense-engram` as they stand in a help or in the docs -> whether the program would take them."""

from __future__ import annotations

import re
import shlex

from typer.main import get_command

from sense_v2.cli import main

PROGRAM = get_command(main.app)


def _flat(group, before: tuple[str, ...] = ()) -> dict:
    """Whole name ("delta show") -> command, of a group and the groups in it."""
    found = {}
    for name, command in group.commands.items():
        names = (*before, name)
        found |= _flat(command, names) if hasattr(command, "commands") else {" ".join(names): command}
    return found


COMMANDS = _flat(PROGRAM)


def parse(words: list[str]) -> None:
    """Raises what the program raises for an option that isn't there or a value of the wrong kind.

    Paths needn't be there: the callbacks of arguments, which look for them, don't run.
    """
    name, *arguments = words
    if arguments and name not in COMMANDS and f"{name} {arguments[0]}" in COMMANDS:
        name = f"{name} {arguments.pop(0)}"
    if name.startswith("--"):  # an option of the program itself
        assert name in {"--help", *(option for parameter in PROGRAM.params for option in parameter.opts)}
        return
    assert name in COMMANDS, f"sense-engram has no command {name!r}"
    command = COMMANDS[name]
    callbacks = [parameter.callback for parameter in command.params]
    try:
        for parameter in command.params:
            parameter.callback = None
        command.make_context(name, arguments)
    finally:
        for parameter, callback in zip(command.params, callbacks, strict=True):
            parameter.callback = callback


def calls(block: str) -> list[list[str]]:
    """The calls in a block of shell lines, each as its words, without what is behind `#`, `>`, `|` or `;`."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "sense-engram":
            end = next((at for at, word in enumerate(words) if word in (">", "|", ";", "&&", "&")), len(words))
            found.append(words[1:end])
    return found
