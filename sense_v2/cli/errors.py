"""An exception -> two lines for a person: what is wrong, with the evidence, and the way out.

The library's errors carry both (`sense_v2.core.errors`). Of errors that carry no way out, such as those of the system
and of other libraries, the type decides which one is offered.
"""

from __future__ import annotations

import errno
import re

from sense_v2.core.errors import NO_ROOM, one_line, what_and_way_out

# Exit statuses, as `sense-engram --help` says; the last is what a shell reports of a program that SIGINT has ended.
FAILED, WRONG_CALL, INTERRUPTED = 1, 2, 130

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)

# How libraries written in Rust (safetensors, tokenizers) name an error of the system.
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def explain(error: BaseException, command: str) -> tuple[str, str]:
    """(what is wrong, the way out), one line each; `command` is what was run, as in "sense-engram train".

    >>> from sense_v2.core.errors import with_way_out
    >>> explain(with_way_out(ValueError("the text has 3 tokens"), "take more text"), "sense-engram train")
    ('the text has 3 tokens', 'take more text')
    >>> explain(FileNotFoundError(2, "No such file or directory", "a.txt"), "sense-engram eval")
    ('a.txt: No such file or directory', 'check the path; `sense-engram eval --help` says what belongs there')
    """
    what, way_out = what_and_way_out(error)
    if way_out is not None:
        return one_line(what), one_line(way_out)
    text = one_line(_message(error))
    number = _errno(error)
    if not _is_known(error) and number is None:
        found = f"{type(error).__name__}: {text}" if text else type(error).__name__
        return found, f"sense-engram didn't expect this; `{_with_debug(command)} …` shows where it comes from"
    return text.removesuffix("."), _way_out(error, number, command)


def _is_known(error: BaseException) -> bool:
    """True if the error is about what the user gave, and not about the code."""
    known = (OSError, ValueError, IndexError, TypeError, ImportError, FloatingPointError, MemoryError)
    return isinstance(error, known) or _is_out_of_memory(error)


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _SYSTEM_ERROR.search(str(error))
    return int(found[1]) if found else None


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: torch need not be loaded here.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "".join(f"{name}: " for name in (error.filename, error.filename2) if name is not None)
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory"
    return str(error)


def _way_out(error: BaseException, number: int | None, command: str) -> str:
    options = f"`{command} --help`"
    if number in NO_ROOM:
        return "make room there, or choose a path on another disk"
    if isinstance(error, FileNotFoundError):
        return f"check the path; {options} says what belongs there"
    if number in NOT_WRITABLE:
        return "choose another path, or change who may read and write this one"
    if _is_out_of_memory(error):
        return "a smaller --batch-size or --sequence-length needs less"
    if isinstance(error, ImportError):
        return f"pip install {(error.name or 'PACKAGE').partition('.')[0]}, the package that has this module"
    return f"{options} says what is allowed; `{_with_debug(command)} …` shows where it was found"


def _with_debug(command: str) -> str:
    program, _, name = command.partition(" ")
    return f"{program} --debug {name}".strip()
