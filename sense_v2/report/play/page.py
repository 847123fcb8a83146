"""The page of `sense-engram play`: its texts and components, and what they call of a `Player`.

Only Gradio is here. What a request comes to is in `player.py`, what is shown of it in `sense_v2.report.playground`.
"""

from __future__ import annotations

import gradio as gr
from fastapi import FastAPI

from sense_v2.report import playground, wording
from sense_v2.report.play.player import Player

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
TEXT = "def __init__(self, name):\n    self.name = name\n"
PROMPT, FACT = "The capital of Zubrowka is", " Lutz."
WATCHED = "The capital of France is Paris\nThe river of Zubrowka is long\nimport os"

LOOK = (
    "## 1 · Look\nBlue tokens are likelier with the memory than without it, orange ones less likely. Point at a "
    "token, or tap it, for its n-grams, the rows they look up, and its **gate**: how much of what was remembered is "
    "added there. Tokens that read the same, as `Name` and `name` do, share a compressed id, and what is remembered "
    "about it."
)
COMPARE = (
    "## 2 · Compare\nHow does the model go on from the text above with its memory, and how with every gate shut?"
)
TEACH = (
    "## 3 · Teach\nA few gradient steps on the rows that a short text looks up, and on nothing else. What is learned "
    "is in this tab alone and can be taken back. Rows are shared, so look at what else moved."
)


def build_app(player: Player) -> FastAPI:
    """Build the page as an ASGI app, without anything of Gradio's that leaves this machine or keeps what is typed."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    return gr.mount_gradio_app(
        app,
        build_blocks(player),
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        # Not as css=…, which Gradio rewrites: rules within a media query would only hold inside of its page.
        head=f"<style>{playground.stylesheet()}</style>",
    )


def theme() -> gr.themes.Base:
    """Use only fonts of the reader's machine, and the reports' background colours."""
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO).set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#14181d",
        block_background_fill_dark="#1d232a",
        input_background_fill_dark="#14181d",
    )


def build_blocks(player: Player) -> gr.Blocks:
    with gr.Blocks(title=f"sense-engram play: {player.name}", analytics_enabled=False) as blocks:
        notebook = gr.State(None)
        orders = wording.listing([str(order) for order in player.memory.config.ngram_orders])
        gr.Markdown(
            f"# What does this model remember?\n`{player.name}` is a language model with a memory: a table of "
            f"{wording.count(player.base.num_embeddings)} rows on disk. At each token it looks up rows by the last "
            f"{orders} tokens (n-grams), and adds them to what it computes itself. Nothing leaves this "
            "machine, and no file of the model changes."
        )
        gr.Markdown(LOOK)
        text = gr.Textbox(TEXT, label="Text", lines=3, max_lines=12, elem_id="text")
        shown = gr.HTML(elem_id="look", apply_default_css=False, js_on_load=None)
        with gr.Accordion("All tokens, n-grams and rows as a table", open=False):
            table = gr.HTML(elem_id="rows", apply_default_css=False, js_on_load=None)

        gr.Markdown(COMPARE)
        with gr.Row():
            max_new_tokens = gr.Slider(
                4, 120, value=40, step=1, label="New tokens", elem_id="new-tokens", min_width=260
            )
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature (0: the likeliest)", min_width=260)
            seed = gr.Number(0, precision=0, label="Seed", min_width=260)
        go_on = gr.Button("Go on from the text", variant="primary", elem_id="generate")
        compared = gr.HTML(elem_id="comparison", apply_default_css=False, js_on_load=None)

        gr.Markdown(TEACH)
        with gr.Row():
            prompt = gr.Textbox(PROMPT, label="Where a text says", elem_id="prompt", min_width=260)
            fact = gr.Textbox(
                FACT, label="it should go on with (mind the space before a word)", elem_id="fact", min_width=260
            )
        with gr.Row():
            watched = gr.Textbox(
                WATCHED, label="Watch these too, a text a line", lines=3, elem_id="watched", min_width=260
            )
            steps = gr.Slider(1, 100, value=40, step=1, label="Steps at most", min_width=260)
        with gr.Row():
            teach = gr.Button("Teach", variant="primary", elem_id="teach")
            undo = gr.Button("Undo the last", elem_id="undo")
            save = gr.Button("Save as a file", elem_id="save")
        taught = gr.HTML(player.facts(None), elem_id="facts", apply_default_css=False, js_on_load=None)
        lesson = gr.HTML(elem_id="lesson", apply_default_css=False, js_on_load=None)

        looking = {"fn": player.look, "inputs": [text, notebook], "outputs": [shown, table]}
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        # One listener for both: the page's first answer, if it is late, doesn't take the place of a newer one. And
        # "change", because Gradio's "input" is only what keys do: text that is pasted or dropped isn't.
        gr.on([blocks.load, text.change], **looking, **quiet, trigger_mode="always_last")
        go_on.click(
            player.go_on,
            [text, max_new_tokens, temperature, seed, notebook],
            compared,
            api_visibility="private",
        )
        known = [lesson, taught, notebook]
        teach.click(
            player.teach, [prompt, fact, steps, text, watched, notebook], known, api_visibility="private"
        ).then(**looking, **quiet)
        undo.click(player.undo, [notebook], known, api_visibility="private").then(**looking, **quiet)
        save.click(player.save, [notebook], lesson, api_visibility="private")
    return blocks
