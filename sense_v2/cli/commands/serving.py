"""Commands that use a trained model: generate, serve, play."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from sense_v2.cli.errors import explain
from sense_v2.cli.options import (
    DeviceOption,
    DtypeOption,
    FolderArgument,
    JsonOption,
    WithoutMemoryOption,
)
from sense_v2.cli.output import LOADING, lines_to, lines_typed, print_json, print_text, tell
from sense_v2.core.errors import CommandError
from sense_v2.report import wording


def generate(
    folder: FolderArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; with --chat a question, or none for a chat.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask as the model's chat template does; without PROMPT, line by line.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to add at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(metavar="NUMBER", min=0, help="How freely to choose; 0: always the likeliest token.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the sampling.")] = 0,
    without_memory: WithoutMemoryOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Print how a trained model goes on from a prompt, or chat with it.

    Example: sense-engram generate runs/train "def main(" --max-new-tokens 40
    """
    if prompt is None and not chat:
        raise typer.BadParameter("give a PROMPT, or --chat to chat line by line")
    if prompt is None and as_json:
        raise typer.BadParameter("--json holds one answer: give a PROMPT with --chat")
    from sense_v2.cli.progress import TokenProgress
    from sense_v2.hf.attach import detach_engram
    from sense_v2.hf.backbones import open_trained
    from sense_v2.hf.insight.comparison import chat_prompt, continue_prompt
    from sense_v2.hf.memory import attached_memory

    LOADING.say(f"loading {folder}")
    model, tokenizer = open_trained(folder, device=device, dtype=dtype)
    with_memory = attached_memory(model) is not None and not without_memory
    if without_memory and attached_memory(model) is not None:
        detach_engram(model)

    def answer(text: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        with TokenProgress("generating", max_new_tokens) as streamer:
            found = continue_prompt(model, tokenizer, text, **settings, streamer=streamer)
        if not found["continuation"].strip():
            tell(f"note: {_why_empty(found, tokenizer, chat)}", file=sys.stderr)
        return found

    if prompt is not None:
        said = [{"role": "user", "content": prompt}]
        found = answer(chat_prompt(tokenizer, said) if chat else prompt)
        if as_json:
            print_json({"model": str(folder), "prompt": prompt, "with_memory": with_memory, **found})
        else:
            print_text(found["continuation"])
        return
    if sys.stdin.isatty():
        tell("chat     one line a turn; Ctrl-D ends it", file=sys.stderr)
    messages: list[dict[str, str]] = []
    for line in lines_typed():
        messages.append({"role": "user", "content": line})
        said = answer(chat_prompt(tokenizer, messages))["continuation"]
        messages.append({"role": "assistant", "content": said})
        print_text(said)


def _why_empty(found: dict[str, Any], tokenizer: Any, chat: bool) -> str:
    """What an answer without a visible character is due to."""
    if found["end"] is not None and found["tokens"] == 1:
        told = f"the model wrote nothing: its first token, {found['end']}, ends the text"
    else:
        tokens = wording.number_of(found["tokens"], "token")
        told = f"the model wrote nothing that can be seen: {tokens} of white space or without a text"
    has_template = not chat and getattr(tokenizer, "chat_template", None)
    return f"{told}; --chat asks it as its chat template does" if has_template else told


def serve(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER", help="What train, demo (runs/demo/model) or save_pretrained has saved.")
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port to listen on.")] = 8000,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="Where the model runs: cpu, cuda:0, auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Type of the weights; auto: as saved.")] = "auto",
    allow_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Answer requests to this name, too, as behind a proxy; repeatable."),
    ] = None,
    continuous_batching: Annotated[
        bool,
        typer.Option(
            "--continuous-batching/--one-by-one",
            help="Answer requests in batches that they join and leave, where the model can, or one after the other.",
        ),
    ] = True,
    cache_tokens: Annotated[
        int, typer.Option(metavar="N", min=64, help="Tokens of all requests that a batch's cache holds at once.")
    ] = 16_384,
    max_waiting: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests being answered or waiting; any beyond that get a 503.")
    ] = 256,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="SENSE_ENGRAM_API_KEY",
            help="The key that requests must carry; without one, anyone may ask.",
        ),
    ] = None,
    overlays: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Deltas of this folder are served, too: facts.safetensors as the model FOLDER+facts. Files that "
            "are added, changed or removed while it serves are noticed.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a trained model with transformers' OpenAI-compatible server.

    Example: sense-engram serve runs/train --port 8000
    """
    from sense_v2.hf.serving.openai_server import openai_server

    folder, url = Path(model), f"http://{host}:{port}/v1"
    LOADING.say(f"loading {folder}")
    server = openai_server(
        folder,
        host=host,
        port=port,
        device=device,
        dtype=dtype,
        names=allow_name or (),
        batched=continuous_batching,
        cache_tokens=cache_tokens,
        max_waiting=max_waiting,
        api_key=api_key,
        overlays=overlays,
    )
    lines_to(as_json)(
        f"model    {folder}, by this name; `curl {url}/models` lists it", f"serving  {url} until Ctrl-C"
    )
    with contextlib.ExitStack() as stack:
        if as_json:
            print_json({"model": str(folder), "url": url, "host": host, "port": port})
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # the server's own lines
        server()


def play(
    folder: FolderArgument,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 7860,
    save_to: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where what you teach the model goes, if you save it.")
    ] = Path("deltas"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Open a page on this machine that shows what a model's memory does, and lets you teach it something.

    Example: sense-engram play runs/demo/model
    """
    from sense_v2.hf.backbones import open_trained
    from sense_v2.hf.memory import attached_memory
    from sense_v2.report.play import server

    with server.listen(port) as listener:
        missing = [name for name in ("gradio", "uvicorn", "fastapi") if find_spec(name) is None]
        if missing:
            raise CommandError(
                f"the page is made with {', '.join(missing)}, not installed here",
                'pip install "sense-v2[play]" installs what it needs',
            )
        LOADING.say(f"loading {folder}")
        model, tokenizer = open_trained(folder, device=device, dtype=dtype)
        memory = attached_memory(model)
        if memory is None:
            raise CommandError(
                f"{folder} has no memory, which is what the page shows",
                "name a folder that train, demo (runs/demo/model) or save_pretrained has saved with one",
            )
        if not memory.config.causal or not model.can_generate():
            raise CommandError(
                f"{folder} is a {type(model).__name__}, which doesn't write text", "name a model that generates"
            )
        # Importing Gradio already reads these.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from sense_v2.report.play.page import build_app
        from sense_v2.report.play.player import Player

        player = Player(
            model, tokenizer, str(folder), save_to, functools.partial(explain, command="sense-engram play")
        )
        app = build_app(player)
        port = listener.getsockname()[1]
        url = f"http://{server.HOST}:{port}"
        lines_to(as_json)(
            f"model    {folder}, {memory.storage.num_embeddings:,} rows; nothing in it changes",
            f"open     {url} in a browser on this machine; Ctrl-C ends it",
        )
        if as_json:
            print_json({"model": str(folder), "url": url, "host": server.HOST, "port": port})
        server.serve(app, listener)
