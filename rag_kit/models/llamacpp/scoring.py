"""Log-probabilities before sampling: of the next token, and of every token of a given answer.

Knows how llama.cpp's server can be brought to tell them: it has none for a prompt, and for a token that it
makes itself only where the text is whole. Knows nothing of adapters; what chooses one is passed on.
"""

from __future__ import annotations

import re

from rag_kit.models.llamacpp.link import Link, Part, refuse

LIKELY = 1000  # tokens among which one is sought before the whole vocabulary, which takes 20 times as long
# Neither can stand in a token's text, where quotes are escaped; to parse all of it takes four times as long.
ID, LOG = re.compile(rb'{"id":(\d+),"token"'), re.compile(rb',"logprob":([^,}]+)}')


async def likeliest(link: Link, asked: Part, top: int) -> dict[int, float]:
    """Return the log-probabilities of the `top` likeliest tokens after the prompt of `asked`.

    `asked` forces some token that is whole: before one that ends amid a character nothing is told.
    """
    raw = await link.raw("/completion", {**asked, "n_predict": 1, "n_probs": top})
    _, *tokens = ID.findall(raw)  # the first one is the forced one
    return dict(zip(map(int, tokens), map(float, LOG.findall(raw)), strict=True))


async def score(link: Link, ids: list[int], answer: list[int], size: int, asked: Part) -> list[float]:
    """Return the log-probability of each token of `answer` after `ids`, of a vocabulary of `size`.

    Each token is forced in turn and tells its own. (A grammar could force them all at once, but none that
    ends amid a character.) What is not told is sought among the likeliest, for which see `likeliest`.
    """
    if wrong := [one for one in answer if not 0 <= one < size]:
        refuse({"message": f"there is no token {wrong[0]}"})
    logs: list[float] = []
    for at, token in enumerate(answer):
        here = {**asked, "prompt": ids + answer[:at], "cache_prompt": at > 0}
        forced = {**here, "n_predict": 1, "n_probs": 1, "temperature": 0, "logit_bias": [[token, 1000.0]]}
        told = (await link.ask("/completion", forced)).get("completion_probabilities")
        if not told or told[0]["id"] != token:
            found = await likeliest(link, here, LIKELY)
            found = found if token in found else await likeliest(link, here, size)
            told = [{"logprob": found[token]}]
        logs.append(told[0]["logprob"])
    return logs
