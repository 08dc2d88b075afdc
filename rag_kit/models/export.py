"""An adapter as a model of an Ollama server: files over HTTP, its template, and a proof that it is the same.

Until a round trip has shown that the server answers as the adapter does here, the model stands under a name
of its own, and whatever happens before then, it is deleted. From 0.34.1 on Ollama takes no adapters: there
`auto` sends merged weights. Knows Ollama's wire; knows nothing of the command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import httpx
import ollama
from langchain_core.messages import HumanMessage, convert_to_messages

from rag_kit.embedded import Progress, cache_root
from rag_kit.errors import ModelError, RagKitError, ServiceError, StoreError, message
from rag_kit.manifest import sha256
from rag_kit.models.divergence import TOP, Divergence, divergence
from rag_kit.models.doctor import admit
from rag_kit.models.go_template import go_template
from rag_kit.models.llamacpp.gguf import Gguf, read_gguf
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.parity import begins_itself, raw_prompt
from rag_kit.models.render import encode_text, render
from rag_kit.ollama import CONNECT_S, SEVERABLE, client, explaining, list_models, probe

if TYPE_CHECKING:
    from rag_kit.settings import Settings

How = Literal["auto", "adapter", "merged"]
OLDEST = (0, 5, 5)  # the first whose /api/create takes files by their digest
PATIENCE_S, CHUNK = 600.0, 16 << 20
# Q8_0 is at 0.005 to 0.011 from the unquantised model, another model or a lost adapter beyond 0.5.
MAX_KL, MIN_AGREEING = 0.05, 0.8
ASKED = (
    "What is your name, and how long does a repair take?",
    "你好，请介绍一下你自己。",
    "How much does it cost? Answer in one sentence.",
    "保修期是多久？",
)
STEPS = 8  # tokens after each of them
NEAR = 0.5  # nats: where no log-probabilities are told, a token so near to our best one counts as agreeing
NAME = re.compile(r"(?:[A-Za-z0-9][\w-]*/)?[A-Za-z0-9][\w.-]*(?::[\w.-]+)?", re.ASCII)


@dataclass(frozen=True)
class Exported:
    """A model that an Ollama server has now: `how` it was made, the bytes that were sent, the round trip.

    `agreement` compares log-probabilities here and there; its `kl` is NaN where the server tells none.
    """

    name: str
    url: str
    how: str
    sent: int
    agreement: Divergence
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        seen = self.agreement
        told: dict[str, Any] = {"name": self.name, "url": self.url, "how": self.how, "sent": self.sent / 1e6}
        told |= {"kl": seen.kl, "argmax": seen.argmax, "n": seen.positions}
        return "\n".join([message("export_done", **told), *self.notes])


def export_adapter(
    reference: str,
    settings: Settings,
    *,
    name: str | None = None,
    how: How = "auto",
    kind: str = "Q8_0",
    replace: bool = False,
    forced: bool = False,
    progress: Progress = None,
) -> Exported:
    """Make the adapter that `reference` names a model of the Ollama server at OLLAMA_BASE_URL.

    `adapter` sends a GGUF adapter for a base that the server has, `merged` the merged weights in block type
    `kind`; `auto` tries them in this order. `forced` lets an adapter through that the doctor refuses. Raises
    ModelError, or ServiceError where the server is absent, too old, refuses or answers otherwise than we do;
    the server is then as it was.
    """
    say, url = progress or (lambda _: None), settings.ollama_base_url
    model = LoRALanguageModel(model=reference, settings=settings, forced=forced)
    adapter, base = model.adapter(), model.base_model
    if adapter is None or base.gguf is None:
        raise ModelError("export_no_adapter" if adapter is None else "export_no_gguf", base=base.name)
    name = name or adapter.name
    if not NAME.fullmatch(name):
        raise ModelError("export_name", name=name)
    _check_server(url)
    if not replace and (name if ":" in name else f"{name}:latest") in list_models(url):
        raise ModelError("export_exists", name=name, url=url)
    notes = admit(reference, settings, forced=forced, model=model)
    gguf = read_gguf(base.gguf)
    template = go_template(model.backend.tokenizer, begins=begins_itself(gguf.metadata))
    made: dict[str, Any] = {"template": template, "parameters": _parameters(model, gguf.context())}
    ways = ("adapter", "merged") if how == "auto" else (how,)
    folder = cache_root(settings.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    server = client(url, PATIENCE_S)
    for way in ways:
        staged, sent = f"rag-kit-unproven-{uuid4().hex[:8]}", 0
        try:
            with TemporaryDirectory(dir=folder) as temporary, _telling(url, name):
                files = _files(way, model, kind, Path(temporary), url, say)
                made |= {"files": {}, "adapters": None}
                for group, called, file in files:
                    digest, size = _send(url, file, say)
                    made[group], sent = {called: digest}, sent + size
                for status in server.create(staged, stream=True, **made):
                    say(str(status.status))
                say(message("export_proving", name=name))
                agreement = _round_trip(server, staged, model, gguf, name)
                server.copy(staged, name)
            return Exported(name, url, way, sent, agreement, notes)
        except RagKitError as error:
            if way == ways[-1] or error.key in ("ollama_unreachable", "export_no_space"):
                raise
            say(message("export_other_way", reason=error.message.rstrip(".。")))
        except OSError as error:  # of the merged file
            raise StoreError("cache_unwritable", path=folder, reason=error) from error
        finally:
            with suppress(ollama.ResponseError, httpx.HTTPError, ConnectionError):  # it was never made
                server.delete(staged)
    raise AssertionError(ways)


def _check_server(url: str) -> None:
    state, told = probe(url)
    if state != "running":
        raise ServiceError("ollama_unreachable", url=url, reason=told)
    version = tuple(int(part) for part in re.findall(r"\d+", told)[:3])
    if (0, 0, 0) != version < OLDEST:  # a build of one's own calls itself 0.0.0
        raise ServiceError("export_too_old", url=url, version=told, oldest=".".join(map(str, OLDEST)))


@contextmanager
def _telling(url: str, name: str) -> Iterator[None]:
    """Say of what goes wrong on the way what is left on the server, where that is not obvious."""
    try:
        with explaining(url, name):
            yield
    except ServiceError as error:
        reason = str(error.values.get("reason", ""))
        if "no space" in reason.lower():
            raise ServiceError("export_no_space", url=url, name=name, reason=reason) from error
        if error.key == "ollama_no_model":  # there is no such route
            raise ServiceError("export_refused", url=url, name=name) from error
        raise


def _files(
    way: str, model: LoRALanguageModel, kind: str, folder: Path, url: str, say: Callable[[str], None]
) -> list[tuple[str, str, Path]]:
    """Return the files that make the model: their part in the request, a name of no meaning, the file."""
    from rag_kit.models.llamacpp.adapter_gguf import adapter_gguf, lora_pairs
    from rag_kit.models.llamacpp.rewrite import rewrite

    adapter, gguf = model.adapter(), model.base_model.gguf
    assert adapter is not None and gguf is not None
    if way == "adapter":
        if not _has(url, f"sha256:{sha256(gguf)}"):
            raise ServiceError("export_base_not_there", url=url, base=model.base_model.name)
        made = adapter_gguf(adapter, gguf, model.settings.cache_dir)
        return [("files", "model.gguf", gguf), ("adapters", "adapter.gguf", made)]
    say(message("export_merging", kind=kind))
    merged = rewrite(gguf, folder / "model.gguf", kind, lora_pairs(adapter, gguf))
    return [("files", "model.gguf", merged)]


def _has(url: str, digest: str) -> bool:
    return httpx.head(f"{url}/api/blobs/{digest}", trust_env=False, timeout=CONNECT_S).is_success


def _send(url: str, file: Path, say: Callable[[str], None]) -> tuple[str, int]:
    """Upload a file unless the server has it; return its digest and the bytes that were sent."""
    digest, size = f"sha256:{sha256(file)}", file.stat().st_size
    if _has(url, digest):
        return digest, 0

    def pieces() -> Iterator[bytes]:
        with file.open("rb") as data:
            while piece := data.read(CHUNK):
                yield piece
                say(message("export_sent", sent=data.tell() / 1e6, size=size / 1e6))

    with httpx.Client(
        trust_env=False, timeout=httpx.Timeout(PATIENCE_S, connect=CONNECT_S), **SEVERABLE
    ) as http:
        sent = {"content": pieces(), "headers": {"Content-Length": str(size)}}
        reply = http.post(f"{url}/api/blobs/{digest}", **sent)  # type: ignore[arg-type]
    if not reply.is_success:
        raise ollama.ResponseError(reply.text, reply.status_code)
    return digest, size


def _parameters(model: LoRALanguageModel, context: int) -> dict[str, Any]:
    """Return what the model shall do unasked: end where the base ends, and sample as it does here."""
    backend, options = model.backend, model.options()
    return {
        "stop": [backend.tokenizer.convert_ids_to_tokens(one) for one in backend.end_ids],
        "num_ctx": context,
        "num_predict": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repeat_penalty": options.repetition_penalty,
    }


def _round_trip(
    server: ollama.Client, name: str, model: LoRALanguageModel, gguf: Gguf, told_as: str
) -> Divergence:
    """Compare what follows probe prompts there with what would follow here; raises ServiceError.

    The prompts go as text past every template (`raw`), greedily; position by position the server's most
    probable tokens stand against our whole distribution after the same ids.
    """
    backend, tokenizer = model.backend, model.backend.tokenizer
    begins = begins_itself(gguf.metadata)
    prompts = [raw_prompt(tokenizer, [HumanMessage(text)], begins=begins) for text in ASKED]
    greedy = {"temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0, "seed": 0, "num_predict": STEPS}
    anchor = tokenizer.encode("a", add_special_tokens=False)
    begin = len(tokenizer.decode(anchor))
    ours: list[dict[int, float]] = []
    theirs: list[dict[int, float]] = []
    agreeing: list[bool] = []
    told = {"name": told_as, "url": model.settings.ollama_base_url}
    _same_tokens(server, name, tokenizer, told)
    with model.holding() as key:
        for number, prompt in enumerate(prompts):
            asked: dict[str, Any] = {"raw": True, "logprobs": True, "top_logprobs": TOP, "options": greedy}
            asked["keep_alive"] = 0 if number == len(prompts) - 1 else None
            said = server.generate(name, prompt.text, **asked)
            count = said.prompt_eval_count
            made = list(prompt.rendered.ids)
            if count is not None and count > len(made):  # fewer may be what was not in a cache
                raise ServiceError("export_other_tokens", **told, found=count, expected=len(made))
            for step in said.logprobs or ():
                row = backend.next_logprobs(made, key)
                near = row.argsort()[: -10 * TOP : -1]
                known = {tokenizer.decode([*anchor, int(one)])[begin:]: int(one) for one in near}
                top = {known[one.token]: one.logprob for one in step.top_logprobs or () if one.token in known}
                ours.append({int(one): float(row[one]) for one in near[:TOP]})
                theirs.append(top or {-1: 0.0})
                if step.token not in known:
                    break
                made.append(known[step.token])
            for token in [] if said.logprobs else encode_text(tokenizer, said.response or "")[:STEPS]:
                row = backend.next_logprobs(made, key)
                agreeing.append(bool(row.max() - row[token] <= NEAR))
                made.append(token)
    if ours:
        seen = divergence(ours, theirs)
    else:
        seen = Divergence(nan, sum(agreeing) / max(len(agreeing), 1), nan, len(agreeing))
    if seen.kl > MAX_KL or not seen.argmax >= MIN_AGREEING:
        limits = {"max_kl": MAX_KL, "min_argmax": MIN_AGREEING}
        raise ServiceError(
            "export_differs", **told, kl=seen.kl, argmax=seen.argmax, n=seen.positions, **limits
        )
    return seen


def _same_tokens(server: ollama.Client, name: str, tokenizer: Any, told: dict[str, str]) -> None:
    """Check that a conversation becomes as many tokens there, through the template that was made, as here.

    Its first text is a new one, so that nothing behind it can be left uncounted as known from a cache.
    """
    texts = [("system", uuid4().hex), *zip(("user", "assistant", "user"), ASKED, strict=False)]
    here = render(tokenizer, convert_to_messages(texts))
    sent = [{"role": role, "content": text} for role, text in texts]
    count = server.chat(name, sent, options={"num_predict": 1}).prompt_eval_count
    if count is not None and not len(here.ids) - here.content_of.index(0) <= count <= len(here.ids):
        raise ServiceError("export_other_tokens", **told, found=count, expected=len(here.ids))
