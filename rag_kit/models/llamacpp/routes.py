"""The routes of the engine process: Ollama's, and our own beside them.

Knows HTTP's answers; knows nothing of keys and processes. What fails before the first line has its status,
an error amid a stream is a line. Of Ollama it differs in this: what does not fit the context is refused and
never cut, keep_alive other than 0 changes nothing, and models are neither made nor fetched here.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import AdapterNotFoundError, ModelError, RagKitError
from rag_kit.manifest import sha256
from rag_kit.models.llamacpp import wire
from rag_kit.models.llamacpp.runner import Runner

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Body = dict[str, Any]
Lines = AsyncGenerator[Body]
opened: ContextVar[list[Lines]] = ContextVar("opened")  # by one request, to be closed when it ends


def application(runner: Runner, name: str) -> ASGIApp:
    """Return the routes over the base called `name` and its adapters, each a model `name+ADAPTER`."""
    from fastapi import FastAPI, HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from starlette.exceptions import HTTPException as NoRoute

    app = FastAPI(openapi_url=None)
    models = {_full(name): None, **{_full(f"{name}+{one}"): one for one in runner.adapters}}
    name = _full(name)

    @cache
    def digest(adapter: str | None) -> str:
        parts = [runner.gguf.path, *([runner.adapters[adapter]] if adapter else [])]
        hashes = [sha256(path) for path in parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    async def failed(_: Any, error: Exception) -> JSONResponse:
        if isinstance(error, NoRoute):
            return JSONResponse({"error": error.detail}, error.status_code)
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            return JSONResponse({"error": f"{first['msg']}: {'.'.join(map(str, first['loc'][1:]))}"}, 400)
        told = isinstance(error, RagKitError) and error.key != "engine_memory"
        status = 404 if isinstance(error, AdapterNotFoundError) else 400 if told else 500
        return JSONResponse({"error": _text(error)}, status)

    for kind in (NoRoute, RequestValidationError, RagKitError, Exception):
        app.add_exception_handler(kind, failed)

    def check(asked: wire.Asked) -> str | None:
        """Return the adapter that is asked for, None for the base."""
        if (model := _full(asked.model)) not in models:
            raise HTTPException(404, f"model '{asked.model}' not found")
        if refusal := asked.refusal():
            raise HTTPException(400, refusal)
        return models[model]

    async def entries(**more: Any) -> Body:
        made = []
        for model, adapter in models.items():
            known = await asyncio.to_thread(digest, adapter)
            made.append(wire.entry(runner.gguf, model, known, *origin(adapter)) | more)
        return {"models": made}

    def origin(adapter: str | None) -> tuple[str, Path | None]:
        return (name, runner.adapters[adapter]) if adapter else ("", None)

    @app.api_route("/", methods=["GET", "HEAD"])
    async def root() -> PlainTextResponse:
        return PlainTextResponse("rag-kit's engine is running")

    @app.api_route("/api/version", methods=["GET", "HEAD"])
    async def version() -> Body:
        from importlib.metadata import version

        return {"version": version("rag-kit"), "engine": f"rag-kit, xllamacpp {version('xllamacpp')}"}

    @app.api_route("/api/tags", methods=["GET", "HEAD"])
    async def tags() -> Body:
        return await entries()

    @app.get("/api/ps")
    async def ps() -> Body:
        import psutil

        held = {"size": psutil.Process().memory_info().rss, "size_vram": 0, "context_length": runner.context}
        return await entries(**held, expires_at="9999-12-31T23:59:59Z") if runner.loaded else {"models": []}

    @app.post("/api/show")
    async def show(asked: wire.Asked) -> Body:
        return wire.shown(runner.gguf, *origin(check(asked)))

    @app.post("/api/chat")
    async def chat(asked: wire.Asked) -> Any:
        messages = [(one.role, one.content) for one in asked.messages]
        prompt = messages and (lambda: runner.render(messages, name))
        return await answer(asked, prompt, lambda text: {"message": {"role": "assistant", "content": text}})

    @app.post("/api/generate")
    async def generate(asked: wire.Asked) -> Any:
        async def prompt() -> list[int]:
            if asked.raw or runner.gguf.template is None:
                return runner.begun(await runner.tokenize(asked.prompt, special=asked.raw))
            system = [("system", asked.system)] if asked.system else []
            return await runner.render([*system, ("user", asked.prompt)], name)

        return await answer(asked, asked.prompt and prompt, lambda text: {"response": text})

    async def answer(asked: wire.Asked, prompt: Any, said: Callable[[str], Body]) -> Any:
        """Answer the prompt that `prompt` makes; where there is none, load the model or unload it."""
        adapter = check(asked)
        start = time.perf_counter_ns()
        texts: list[str] = []

        def line(text: str, **more: Any) -> Body:
            texts.append(text)
            return {"model": asked.model, "created_at": wire.time_of(time.time()), **said(text), **more}

        async def lines() -> Lines:
            last: Body = {"done_reason": "unload" if asked.leaves else "load"}
            if prompt:
                async with runner.turn() as load_ns:
                    ids = await prompt()
                    sampling = asked.options.after(len(ids), runner.context) | asked.grammar()
                    async with aclosing(runner.generate(ids, sampling, adapter)) as parts:
                        async for part in parts:
                            if part.get("text"):
                                yield line(part["text"], done=False)
                    spent = time.perf_counter_ns() - start
                    last = {"total_duration": spent, "load_duration": load_ns} | part
            elif not asked.leaves:
                await runner.load()
            if asked.leaves:
                await runner.unload()
            yield line("", done=True, **last)

        if asked.stream:
            return await _stream(lines())
        async with aclosing(lines()) as every:
            *_, last = [one async for one in every]
        return last | said("".join(texts))

    @app.post("/api/embed")
    async def embed(asked: wire.Asked) -> Body:
        if check(asked) is not None:  # llama.cpp computes vectors without adapters
            raise HTTPException(400, f'"{asked.model}" does not support embeddings')
        start, limit = time.perf_counter_ns(), asked.options.limit(runner.context)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        async with runner.turn() as load_ns:
            ids = [runner.begun(await runner.tokenize(text, special=False)) for text in texts if text]
            longest = max(map(len, ids), default=0)
            if longest > limit and not asked.truncate:
                raise ModelError("engine_prompt_too_long", tokens=longest, limit=limit)
            ids = [one[:limit] for one in ids]
            vectors = await runner.embed(ids) if ids else []
        if asked.leaves:
            await runner.unload()
        spent = {"total_duration": time.perf_counter_ns() - start, "load_duration": load_ns}
        return {"model": asked.model, "embeddings": vectors, **spent, "prompt_eval_count": sum(map(len, ids))}

    @app.post("/engine/generate")
    async def from_ids(asked: wire.Own) -> Any:
        async def lines() -> Lines:
            runner.check(asked.adapter)
            async with runner.turn():
                made = asked.ids, asked.options.after(len(asked.ids), runner.context)
                top, who = asked.logprobs, Body(adapter=asked.adapter, cache=asked.cache)
                parts = runner.steps(*made, top, **who) if top else runner.generate(*made, **who)
                async with aclosing(parts):
                    async for part in parts:
                        yield part | {"done": "done_reason" in part}

        return await _stream(lines())

    @app.post("/engine/next")
    async def following(asked: wire.Own) -> Body:
        runner.check(asked.adapter)
        async with runner.turn():
            asked.options.after(len(asked.ids), runner.context)
            logs = await runner.next(asked.ids, asked.adapter, cache=asked.cache)
        return {"logprobs": base64.b64encode(logs.tobytes()).decode()}

    @app.post("/engine/score")
    async def scored(asked: wire.Own) -> Body:
        runner.check(asked.adapter)
        async with runner.turn():
            asked.options.after(len(asked.ids) + len(asked.answer), runner.context)
            return {"logprobs": await runner.score(asked.ids, asked.answer, asked.adapter)}

    @app.post("/engine/tokenize")
    async def tokenize(asked: wire.Own) -> Body:
        async with runner.turn():
            return {"ids": await runner.tokenize(asked.text, special=asked.special)}

    @app.get("/engine/state")
    async def state() -> Body:
        counted = {"requests": runner.requests, "tokens": runner.tokens, "busy": await runner.busy()}
        model = {"model": name, "gguf": str(runner.gguf.path), "adapters": [*runner.adapters]}
        held = runner.gguf.cache_bytes(runner.context) * runner.slots
        caches = {"context": runner.context, "slots": runner.slots, "cache_bytes": held}
        return {**model, **caches, "loaded": runner.loaded, **counted}

    return app


def _full(model: str) -> str:
    return model if ":" in model else f"{model}:latest"


def _text(error: Exception) -> str:
    if isinstance(error, MemoryError):
        error = ModelError("engine_memory", reason="MemoryError")
    return str(error) or type(error).__name__


async def _stream(lines: Lines) -> Any:
    """Return a response of JSON lines; what fails before the first has its status, later it is a line."""
    from fastapi.responses import StreamingResponse

    opened.get().append(lines)
    first = await anext(lines)

    async def told() -> AsyncGenerator[str]:
        yield json.dumps(first) + "\n"
        try:
            async for line in lines:
                yield json.dumps(line) + "\n"
        except Exception as error:
            yield json.dumps({"error": _text(error)}) + "\n"

    return StreamingResponse(told(), media_type="application/x-ndjson")
