"""The one prompt: system, passages, question, in the question's language.

The same messages are rendered for training, for local engines and for Ollama.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

SYSTEM = {
    "en": (
        "You answer customers' questions. Answer briefly. "
        "When sources are given, use only them and cite them as [1]."
    ),
    "zh": "你回答客户的问题。回答要简短。给出资料时，只依据资料回答，并用 [1] 这样的编号注明出处。",
}
SOURCES = {"en": "Sources:", "zh": "资料："}
QUESTION = {"en": "Question: {question}", "zh": "问题：{question}"}


def build_messages(
    question: str,
    passages: Sequence[str] = (),
    *,
    language: str = "en",
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> list[BaseMessage]:
    """Return the messages for `question` with numbered `passages`; `history` holds (question, answer)."""
    messages: list[BaseMessage] = [SystemMessage(system or SYSTEM[language])]
    for asked, answered in history:
        messages += [HumanMessage(asked), AIMessage(answered)]
    if not passages:
        return [*messages, HumanMessage(question)]
    numbered = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    asked = QUESTION[language].format(question=question)
    return [*messages, HumanMessage(f"{SOURCES[language]}\n{numbered}\n\n{asked}")]
