"""What generates the answers of a server: requests in one batch, or one after the other.

    request ──settings──▶ greedy   ──▶ an engine that batches continuously, without any logits processor
                          sampling ──▶ another, with each request's own temperature, top-k and top-p
                          others   ──▶ `generate`, one after the other (stop texts, penalties, a seed)

transformers' server keeps one engine, whose settings are those of the first request; each later one would silently
have them. (Both engines here could go when its continuous batching takes a request's own settings.) An engine starts
with its first request and has a paged cache of its own.

They take turns with the model, a forward at a time: transformers says in the model's configuration, while a forward
lasts, whether it is causal, and the forward of another thread would read that. (Could go when it no longer does.)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import Any

import torch
from fastapi import HTTPException
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.utils import BaseGenerateManager, CBStreamer, GenerateManager, GenerationState

from sense_v2.core.errors import with_way_out
from sense_v2.hf.memory import attached_memory
from sense_v2.hf.overlays import ids_with_overlay
from sense_v2.hf.serving.continuous_batching import why_not_batched
from sense_v2.hf.serving.gate import asked
from sense_v2.hf.serving.served_overlays import ServedOverlays

log = logging.getLogger("sense_v2.serve")

PAGE_TOKENS = 32
BATCH_TOKENS = 512


class Engines(BaseGenerateManager):
    """One model's engines.

    Args:
        cache_tokens: How many tokens of requests an engine's cache holds.
        overlays: What requests may name, if anything.
    """

    def __init__(self, cache_tokens: int, overlays: ServedOverlays | None = None) -> None:
        self.cache_tokens, self.overlays = cache_tokens, overlays
        self.batched: dict[bool, Any] = {}
        """Managers of continuous batching, by whether they sample."""
        self.alone = GenerateManager()
        self.model: Any = None
        self._turn = threading.Lock()
        self._hooks: list[Any] = []

    def init_cb(self, model: Any, gen_config: Any) -> None:
        """Take the model; what transformers' handlers call first."""
        if self.model is None:
            self.model = model
            self._hooks = [
                model.register_forward_pre_hook(lambda *_: self._turn.acquire() and None, prepend=True),
                model.register_forward_hook(lambda *_: self._turn.release(), always_call=True),
            ]

    def is_alive(self) -> bool:
        """False once an engine has stopped by an error."""
        return all(engine.background_thread_status.fatal_error is None for engine in self.batched.values())

    def stop(self) -> None:
        """Stop the engines; what waits in them fails."""
        for engine in self.batched.values():
            engine.stop(block=True, timeout=5, hard_stop=True)
        self.alone.stop()
        for hook in self._hooks:
            hook.remove()

    @property
    def num_waiting(self) -> int:
        """Count the requests that are generated or wait for it."""
        found = 0
        for engine in self.batched.values():
            processor = engine.batch_processor
            found += engine.input_queue.qsize()
            if processor is not None:
                found += len(processor.scheduler.active_requests) + len(processor.scheduler.waiting_requests)
        return found

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> Any:
        """Do what transformers' managers do: a queue of texts, and what puts them there."""
        overlay = self._overlay(model)
        if not _batches(inputs, gen_config):
            return self.alone.generate_streaming(
                model, processor, *_one_by_one(model, inputs, gen_config, overlay), request_id, response_parser
            )
        queue: asyncio.Queue[Any] = asyncio.Queue()
        engine = self._engine(gen_config)
        inner = getattr(processor, "tokenizer", processor)._tokenizer  # what CBStreamer takes
        streamer = CBStreamer(
            engine, request_id, inner, asyncio.get_running_loop(), queue, response_parser=response_parser
        )

        def put(output: Any) -> None:
            streamer.put(output)
            if output.error is not None:
                queue.put_nowait(_failed(output.error))
            if output.error is not None or output.is_finished():
                streamer.end()

        engine.register_result_handler(request_id, put)
        self._add(engine, inputs, gen_config, request_id, overlay, streaming=True)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """Do what transformers' managers do: the text, the prompt's length, the tokens."""
        overlay = self._overlay(model)
        if not _batches(inputs, gen_config):
            return await self.alone.generate_non_streaming(
                model, processor, *_one_by_one(model, inputs, gen_config, overlay), request_id
            )
        engine = self._engine(gen_config)
        answer = asyncio.get_running_loop().create_future()
        engine.register_result_handler(request_id, partial(_finish, answer))
        self._add(engine, inputs, gen_config, request_id, overlay, streaming=False)
        try:
            output = await answer
        except asyncio.CancelledError:  # the client is gone
            engine.cancel_request(request_id)
            raise
        if output.error is not None:
            raise RuntimeError(f"the answer can't be generated: {output.error}")
        text = processor.decode(output.generated_tokens, skip_special_tokens=True)
        return text, len(inputs["input_ids"]), output.generated_tokens

    def _overlay(self, model: Any) -> str | None:
        """Find what the model calls the overlay that the request names. What is wrong with its file is an error of
        this request alone."""
        try:
            return None if self.overlays is None else self.overlays.loaded(model)
        except (OSError, ValueError) as error:
            log.warning("an overlay can't be read: %s", error)
            raise HTTPException(503, "this overlay can't be read now; the server's log says why") from error

    def _engine(self, gen_config: Any) -> Any:
        samples = bool(gen_config.do_sample)
        if samples not in self.batched:
            # Processors are made for what isn't neutral; a request then has its own value.
            settings = {"temperature": 0.5, "top_k": 50, "top_p": 0.5} if samples else {}
            engine = self.model.init_continuous_batching(
                generation_config=GenerationConfig(
                    do_sample=samples,
                    eos_token_id=gen_config.eos_token_id,
                    pad_token_id=gen_config.pad_token_id,
                    **settings,
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE_TOKENS,
                    num_blocks=-(-self.cache_tokens // PAGE_TOKENS),
                    max_batch_tokens=BATCH_TOKENS,
                    per_request_processors=samples,
                ),
            )
            engine.start()
            self.batched[samples] = engine
        return self.batched[samples]

    def _add(
        self, engine: Any, inputs: Any, gen_config: Any, request_id: str, overlay: str | None, *, streaming: bool
    ) -> None:
        own = {}
        if gen_config.do_sample:
            top_k = gen_config.top_k or self.model.config.get_text_config().vocab_size
            own = {
                "temperature": float(gen_config.temperature or 1),
                "top_k": int(top_k),
                "top_p": float(1.0 if gen_config.top_p is None else gen_config.top_p),
            }
        token_ids = inputs["input_ids"]
        added = engine.add_request(
            token_ids if overlay is None else ids_with_overlay(self.model, token_ids, overlay),
            request_id=request_id,
            max_new_tokens=gen_config.max_new_tokens,
            eos_token_id=gen_config.eos_token_id,
            streaming=streaming,
            **own,
        )
        if added is None:
            raise with_way_out(RuntimeError("the engine has stopped"), "restart the server")


class State(GenerationState):
    """What transformers' handlers ask for a manager: there is one, and it batches where the model can."""

    def __init__(self, cache_tokens: int, *, batched: bool = True, overlays: ServedOverlays | None = None) -> None:
        super().__init__(continuous_batching=batched)
        self.engines = Engines(cache_tokens, overlays)
        self._can: bool | None = None if batched else False

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        """True where the model can; one that can't is answered one request after the other."""
        if self._can is None:
            why = why_not_batched(model)
            self._can = why is None
            if why is not None:
                log.warning("requests are answered one after the other: %s", why)
        return self._can

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return the engines, which see from a request's inputs whether it comes one after the other."""
        return self.engines

    def is_cb_alive(self) -> bool:
        """False once an engine has stopped by an error."""
        return self.engines.is_alive()

    def metrics(self) -> Any:
        """What the operator sees of the engines (see `operations.Sample`)."""
        if self.engines.overlays is not None:
            current = len(self.engines.overlays.current)
            yield "overlays", "gauge", "Overlays that are in memory.", {"": current}
        yield "engine_requests", "gauge", "Requests in the engines of batches.", {"": self.engines.num_waiting}
        memory = None if self.engines.model is None else attached_memory(self.engines.model)
        tables = {} if memory is None else {f'table="{n}"': s.stats() for n, s in enumerate(memory.storages)}
        for name, what in (
            ("calls", "Lookups of the memory's table."),
            ("rows", "Rows that were looked up."),
            ("bytes", "Bytes of these rows."),
            ("asked", "Lookups with rows that weren't in memory, asked for first."),
            ("slow", "Lookups that took longer than rows in memory can."),
            ("wait_seconds", "Seconds of these."),
        ):
            yield f"memory_{name}_total", "counter", what, {at: getattr(found, name) for at, found in tables.items()}
        waits = {
            f'{at},quantile="{share}"': found.wait_percentile(share)
            for at, found in tables.items()
            for share in (0.5, 0.9, 0.99)
        }
        yield "memory_wait_seconds", "gauge", "Seconds of a slow lookup, to a factor of two.", waits

    def shutdown(self) -> None:
        """Stop what generates."""
        self.engines.stop()


def _batches(inputs: Any, gen_config: Any) -> bool:
    """True for what an engine does exactly: its batches know no stop texts, penalties or seeds. Inputs are tensors
    where the model can't be batched."""
    if isinstance(inputs["input_ids"], torch.Tensor):
        return False
    is_neutral = all(
        getattr(gen_config, name, None) in (None, neutral)
        for name, neutral in {
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "min_p": 0.0,
            "typical_p": 1.0,
            "num_beams": 1,
            "min_new_tokens": 0,
        }.items()
    )
    seeded = gen_config.do_sample and asked.get().get("seed") is not None
    return is_neutral and not gen_config.stop_strings and not seeded


def _one_by_one(model: Any, inputs: Any, gen_config: Any, overlay: str | None) -> tuple[dict[str, Any], Any]:
    """Make what `generate` takes of what an engine takes."""
    if not isinstance(inputs["input_ids"], torch.Tensor):
        inputs = {name: torch.tensor([values], device=model.device) for name, values in inputs.items()}
        gen_config.use_cache = True
    if overlay is not None:
        inputs = {**inputs, "overlay": overlay}
    return inputs, gen_config


def _finish(answer: asyncio.Future[Any], output: Any) -> None:
    if not answer.done():
        answer.set_result(output)


def _failed(what: str) -> Any:
    from transformers.cli.serving.utils import _StreamError  # what the handlers take for an error

    return _StreamError(what)
