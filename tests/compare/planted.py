"""A small handbook in two languages, an index over it, and chat models chosen by their reference.

Imported by name too: a test also runs it in a child process.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from rag_kit.answer import Answer, answer
from rag_kit.compare.metrics import score_tokens
from rag_kit.data.questions import Question, Span
from rag_kit.errors import ModelError, ServiceError
from rag_kit.index.hit import Hit

DOCUMENTS = {
    "warranty.en.md": "The K7.2 kettle carries a warranty of 48 months. Repairs take 3.5 days on average.",
    "returns.en.md": "Parcels are returned to Harbour Lane 12. The courier is called Blue Heron.",
    "保修.md": "晨曦水壶的保修期为 48 个月。维修平均需要 3.5 天。",
    "退货.md": "退货地址是海港路 12 号。快递公司叫蓝鹭。",
}
PLANTED = [
    ("en-1", "en", "How long is the warranty of the K7.2 kettle?", "48 months", "warranty.en.md"),
    ("en-2", "en", "Where are parcels returned to?", "Harbour Lane 12", "returns.en.md"),
    ("zh-1", "zh", "晨曦水壶的保修期是多久？", "48 个月", "保修.md"),
    ("zh-2", "zh", "退货地址在哪里？", "海港路 12 号", "退货.md"),
]


def planted_questions() -> list[Question]:
    """Four questions with gold spans, and one that no document answers."""
    planted = [
        Question(
            id=id_,
            text=text,
            answers=(answer,),
            spans=(Span(source, at := DOCUMENTS[source].index(answer), at + len(answer)),),
            answerable=True,
            language=language,
            split="test",
        )
        for id_, language, text, answer, source in PLANTED
    ]
    nobody_knows = Question(
        id="zh-3",
        text="老板的生日是哪天？",
        answers=(),
        spans=(),
        answerable=False,
        language="zh",
        split="test",
    )
    return [*planted, nobody_knows]


@dataclass
class Shelf:
    """An index over DOCUMENTS, one chunk a document, ranked by shared score tokens; counts its searches."""

    fails: Exception | None = None
    searched: list[str] = field(default_factory=list)

    def search(self, query: str, k: int) -> list[Hit]:
        self.searched.append(query)
        if self.fails:
            raise self.fails
        wanted = set(score_tokens(query))
        scored = sorted(
            ((len(wanted & set(score_tokens(text))), source) for source, text in DOCUMENTS.items()),
            reverse=True,
        )
        return [
            Hit(
                Document(
                    DOCUMENTS[source], metadata={"source": source, "start": 0, "end": len(DOCUMENTS[source])}
                ),
                float(score),
                rank,
                {"dense": rank},
            )
            for rank, (score, source) in enumerate(scored[:k], 1)
        ]


class Planted(BaseChatModel):
    """Knows the planted facts, or says that it does not; from passages it copies the first one.

    Its reasoning always holds the answers. `down` is a server that went away.
    """

    model: str = "planted"

    @property
    def _llm_type(self) -> str:
        return "planted"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        if self.model == "down":
            raise ServiceError("compare_in_use", folder="http://127.0.0.1:1")
        prompt = str(messages[-1].content)
        facts = [answer for _, _, text, answer, _ in PLANTED if text in prompt]
        if self.model == "lora" and facts:
            text = f"{facts[0]}【1】" if "[1]" in prompt else facts[0]
        elif "[1]" in prompt:
            text = prompt.split("[1] ")[1].split("\n")[0]
        else:
            text = "I do not know."
        message = AIMessage(
            text,
            additional_kwargs={"reasoning_content": "48 months, Harbour Lane 12"},
            usage_metadata={"input_tokens": len(prompt), "output_tokens": 5, "total_tokens": len(prompt) + 5},
            response_metadata={"finish_reason": "stop"},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


def load(reference: str) -> BaseChatModel:
    """Choose a model by its reference, as `load_model` does."""
    if reference == "missing":
        raise ModelError("compare_arm", arm=reference, contexts="-")
    return Planted(model=reference)


def ask(*args: Any, **how: Any) -> Answer:
    """Ask as the house does, with a clock that stands still."""
    return replace(answer(*args, **how), timings={"first_token_s": 0.5, "total_s": 1.5})
