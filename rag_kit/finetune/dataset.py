"""Conversations to training examples: token ids, the loss mask, and batches that share their beginning.

The loss counts the assistant's text and the end mark behind it, nothing else; what stands before is
token for token what the engine is given when it answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage

from rag_kit.errors import DataError, ModelError
from rag_kit.models.render import Rendered, render

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, its own id as the label where the loss counts it, else -100."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first that the loss counts."""
        return next(at for at, label in enumerate(self.labels) if label != IGNORED)


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Sequence[BaseMessage]], ends: Sequence[int], max_length: int
) -> list[Example]:
    """Return the examples of all conversations; `ends` are the ids that end an answer.

    Raises DataError where an example is longer than `max_length` tokens (nothing is ever cut), ModelError
    where the chat template puts no end mark behind an answer.
    """
    examples = [example for each in conversations for example in encode(tokenizer, each, ends)]
    long = [len(example) for example in examples if len(example) > max_length]
    if long:
        raise DataError(
            "finetune_too_long", count=len(long), total=len(examples), longest=max(long), limit=max_length
        )
    return examples


def encode(tokenizer: Any, messages: Sequence[BaseMessage], ends: Sequence[int]) -> list[Example]:
    """Return one example with every assistant message labelled.

    Where the template renders a past turn otherwise than the prompt for it (Qwen3 drops its thoughts), each
    assistant message becomes an example of its own behind the prompt that the engine would be given.
    """
    whole = render(tokenizer, messages, add_generation_prompt=False)
    turns = [number for number, message in enumerate(messages) if message.type == "ai"]
    spans = {turn: _answer_span(tokenizer, whole, turn, ends) for turn in turns}
    prompts = {turn: render(tokenizer, messages[:turn]).ids for turn in turns}
    if all(whole.ids[: spans[turn][0]] == prompts[turn] for turn in turns):
        labels = [IGNORED] * len(whole.ids)
        for start, end in spans.values():
            labels[start:end] = whole.ids[start:end]
        stop = max(end for _, end in spans.values())
        return [Example(whole.ids[:stop], tuple(labels[:stop]))]
    examples = []
    for turn in turns:
        start, end = spans[turn]
        answer, prompt = whole.ids[start:end], prompts[turn]
        examples.append(Example(prompt + answer, (IGNORED,) * len(prompt) + answer))
    return examples


def _answer_span(tokenizer: Any, whole: Rendered, turn: int, ends: Sequence[int]) -> tuple[int, int]:
    """Return where the text of message `turn` begins and where the end mark behind it ends."""
    start = whole.content_of.index(turn)
    at = start + whole.content_of[start:].count(turn)
    while at < len(whole.ids) and whole.content_of[at] == -1:
        if whole.ids[at] in ends:
            return start, at + 1
        at += 1
    raise ModelError("finetune_no_end_mark", base=tokenizer.name_or_path)


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """Return one batch as a single sequence: the tokens that all examples begin with once, then each rest.

    A mask lets every rest see the beginning and itself only, and positions restart behind the beginning, so
    that each example gets the loss and gradient that it gets alone; nothing is padded. Logits are computed
    at the labelled positions only (`logits_to_keep`). Shapes: ids and positions (1, T), mask (1, 1, T, T),
    labels (1, n).
    """
    import torch

    shared = _shared_length(examples)
    ids = list(examples[0].ids[:shared])
    positions, owner = list(range(shared)), [0] * shared
    kept: list[int] = []
    targets: list[int] = []
    for number, example in enumerate(examples, 1):
        offset = len(ids) - shared
        for at in range(example.prompt_length, len(example)):
            if example.labels[at] != IGNORED:
                kept.append(offset + at - 1)  # the position that predicts this token
                targets.append(example.labels[at])
        ids += example.ids[shared:]
        positions += range(shared, len(example))
        owner += [number] * (len(example) - shared)
    owners = torch.tensor(owner)
    visible = (owners[:, None] == owners[None, :]) | (owners == 0)[None, :]
    labels = torch.tensor([targets])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": visible.tril()[None, None],
        "logits_to_keep": torch.tensor(kept),
        "labels": labels,
        "shift_labels": labels,  # already shifted: label i belongs to logit i
    }


def _shared_length(examples: Sequence[Example]) -> int:
    """Return how many tokens all prompts begin with; the token that predicts an answer is never shared."""
    shortest = min(example.prompt_length for example in examples) - 1
    first = examples[0].ids
    for at in range(shortest):
        if any(example.ids[at] != first[at] for example in examples):
            return at
    return max(shortest, 0)
