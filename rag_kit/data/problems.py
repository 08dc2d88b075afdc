"""Several faults in one report, so that a user mends a folder or a file once."""

from collections.abc import Sequence

from rag_kit.errors import DataError, message

SHOWN = 5


class SeveralProblems(DataError):
    """One error that lists the first few of `problems` and counts them all.

    `key` names a pair whose first text has `{count}` and `{problems}`.
    """

    def __init__(self, key: str, /, problems: Sequence[DataError], **values: object) -> None:
        super().__init__(key, **values)
        self.problems = tuple(problems)

    def text(self, lang: str | None = None) -> tuple[str, str]:
        """Return (what is wrong, what to do), the listed problems in the same language."""
        shown = [problem.text(lang)[0].rstrip(".。") for problem in self.problems[:SHOWN]]
        if rest := len(self.problems) - len(shown):
            shown.append(message("problems_more", lang, rest=rest))
        self.values |= {"count": len(self.problems), "problems": "; ".join(shown)}
        return super().text(lang)
