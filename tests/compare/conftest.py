"""Fixtures of the compare room; what they give stands in `planted`."""

import pytest

from rag_kit.data.questions import Question
from rag_kit.errors import use_language
from tests.compare.planted import planted_questions


@pytest.fixture(autouse=True)
def english():
    use_language("en")
    yield
    use_language("auto")


@pytest.fixture
def questions() -> list[Question]:
    return planted_questions()
