"""The one renderer: chat messages to token ids by the base's own template.

Text of documents and users is encoded apart from the template, so that `<|im_end|>` in a document
stays eight plain characters and never becomes a control token. Training and every local engine use
the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

from rag_kit.errors import ModelError
from rag_kit.manifest import fingerprint

ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: in no template; content is encoded apart anyway


@dataclass(frozen=True)
class Rendered:
    """Token ids of a prompt; `content_of[i]` is the message whose text token i belongs to, or -1."""

    ids: tuple[int, ...]
    content_of: tuple[int, ...]

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

    Raises ModelError where the base has no chat template or the template refuses the messages.
    """
    contents = [text_of(message) for message in messages]
    marked = [
        {"role": ROLES.get(message.type, message.type), "content": f"{_OPEN}{number}{_CLOSE}"}
        for number, message in enumerate(messages)
    ]
    if not tokenizer.chat_template:
        raise ModelError("no_chat_template", base=tokenizer.name_or_path)
    try:
        text = tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=add_generation_prompt, **template
        )
    except Exception as error:  # jinja2's own errors and whatever a template raises
        raise ModelError("template_refused", base=tokenizer.name_or_path, reason=error) from error

    ids: list[int] = []
    owner: list[int] = []
    for number, piece in enumerate(text.split(_OPEN)):
        index, _, rest = piece.rpartition(_CLOSE) if number else ("", "", piece)
        if index:
            encoded = encode_text(tokenizer, contents[int(index)])
            ids += encoded
            owner += [int(index)] * len(encoded)
        encoded = tokenizer.encode(rest, add_special_tokens=False) if rest else []
        ids += encoded
        owner += [-1] * len(encoded)
    return Rendered(tuple(ids), tuple(owner))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of foreign text: no special token is added and none is recognised in it."""
    if not text:
        return []
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def end_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Return the ids that end an answer: the generation config's, else the tokenizer's end token."""
    declared = getattr(generation_config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    ids = [*ids, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
