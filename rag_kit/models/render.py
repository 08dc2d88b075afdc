"""The one renderer: chat messages to token ids by the base's own template.

Text of documents and users is encoded apart from the template and without the tokenizer's added tokens,
so that `<|im_end|>` in a document stays plain characters and never becomes a control token. Training and
every local engine use the same ids.

For harmless text these are the ids of `apply_chat_template`, with one exception: where a content begins
with blank space that the template keeps, byte-pair merges do not reach across its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

from rag_kit.errors import ModelError
from rag_kit.manifest import fingerprint
from rag_kit.models.marks import marks, pieces
from rag_kit.models.textstream import THINK_OPEN

ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}


@dataclass(frozen=True)
class Rendered:
    """Token ids of a prompt; `content_of[i]` is the message whose text token i belongs to, or -1.

    `text` is the prompt as a string, in which nothing tells foreign text from the template's.
    """

    ids: tuple[int, ...]
    content_of: tuple[int, ...]
    text: str = ""

    @property
    def thinks(self) -> bool:
        """Whether the template itself has begun the reasoning that the answer goes on with."""
        return self.text.rstrip().endswith(THINK_OPEN)

    @property
    def hash(self) -> str:
        """SHA-256 of the ids: equal hashes mean equal prompts."""
        return fingerprint(list(self.ids))


def text_of(message: BaseMessage) -> str:
    """Return a message's text: the text blocks of its content, joined."""
    return str(message.text)


def render(
    tokenizer: Any, messages: Sequence[BaseMessage], *, add_generation_prompt: bool = True, **template: Any
) -> Rendered:
    """Render `messages` with the tokenizer's chat template; the contents are encoded apart.

    `template` are its own switches, such as `enable_thinking`, which is off unless said. Raises ModelError
    where the base has no chat template or the template refuses the messages.
    """
    contents = [text_of(message) for message in messages]
    roles = (ROLES.get(message.type, message.type) for message in messages)
    marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks(contents), strict=True)]
    if not tokenizer.chat_template:
        raise ModelError("no_chat_template", base=tokenizer.name_or_path)
    try:
        text: str = tokenizer.apply_chat_template(
            marked,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **{"enable_thinking": False, **template},
        )
    except Exception as error:  # jinja2's own errors and whatever a template raises
        raise ModelError("template_refused", base=tokenizer.name_or_path, reason=error) from error

    ids: list[int] = []
    owner: list[int] = []
    parts = list(pieces(text, contents))
    for piece, of in parts:
        encoded = _encode_template(tokenizer, piece) if of < 0 else encode_text(tokenizer, piece)
        ids += encoded
        owner += [of] * len(encoded)
    return Rendered(tuple(ids), tuple(owner), "".join(piece for piece, _ in parts))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of foreign text: no token is added, and no added token is recognised in it.

    Runs the backend's pipeline by hand: `split_special_tokens=True` overlooks added tokens that are not
    special (Qwen's `<tool_call>`), and switches the shared tokenizer over for other threads too.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words if word for token in backend.model.tokenize(word)]


def _encode_template(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def end_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the ids that end an answer: the generation config's, else the tokenizer's end token."""
    declared = getattr(generation_config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    ids = [*ids, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
