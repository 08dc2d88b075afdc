"""A base's chat template in Ollama's language.

Knows Go's template syntax as far as it writes it; knows nothing of servers.
"""

from __future__ import annotations

import re
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from rag_kit.errors import ModelError
from rag_kit.models.render import render

S, U, A = SystemMessage("\ue000S"), HumanMessage("\ue000U"), AIMessage("\ue000A")
CHATS: tuple[list[BaseMessage], ...] = (
    [U],
    [S, U],
    [U, A, U],
    [S, U, A, U],
    [S, U, A, U, A, U],
    [S, U, A, U, A, U, A, U],
)


def go_template(tokenizer: Any, *, begins: bool = False) -> str:
    """Return the chat template of `tokenizer` in Ollama's language (Go's), with the same text to the letter.

    What stands before, between and behind the messages is read off the template's own output, put together
    in Go, and compared with it over conversations of up to eight messages. Raises ModelError where the
    template is not of that form. `begins`: the server puts the first token before every text by itself.
    """
    try:
        parts = [re.split("\ue000[SUA]", render(tokenizer, chat).text) for chat in CHATS[:3]]
        (before, end), (system, behind, _), (_, answered, asked, _) = parts
    except ValueError:
        raise ModelError("export_template", base=tokenizer.name_or_path) from None
    between = {"ai": answered, "human": asked}

    def same(chat: list[BaseMessage]) -> bool:
        """Whether the Go template below would say the same of the conversation."""
        first, *rest = [one for one in chat if one is not S]
        told = (f"{system}{S.content}{behind}" if chat[0] is S else before) + str(first.content)
        told += "".join(f"{between[one.type]}{one.content}" for one in rest)
        return told + end == render(tokenizer, chat).text

    if not all(same(chat) for chat in CHATS) or "{{" in "".join(map("".join, parts)):
        raise ModelError("export_template", base=tokenizer.name_or_path)
    if begins:
        before, system = (part.removeprefix(tokenizer.bos_token or "") for part in (before, system))
    user = f"{{{{ if $begun }}}}{asked}{{{{ end }}}}{{{{ .Content }}}}{{{{ $begun = true }}}}"
    return (
        f"{{{{ if .System }}}}{system}{{{{ .System }}}}{behind}{{{{ else }}}}{before}{{{{ end }}}}"
        f'{{{{ $begun := false }}}}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answered}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}{end}'
    )
