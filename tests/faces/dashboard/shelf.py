"""What the page is tested with, here and in a notebook's kernel: two passages, and a look at the health."""

from html import escape

from langchain_core.documents import Document

from rag_kit.index.hit import Hit

EVIL = "<img src=x onerror='window.hit=1'><script>window.hit=1</script>"
PASSAGES = [
    ("warranty.md", "The warranty of every Orrinvale kettle lasts two years."),
    (f"保修{EVIL}.md", f"每台水壶的保修期为两年。{EVIL}"),
]


class Shelf:
    """An index that knows two passages."""

    def search(self, query, k):
        return [
            Hit(Document(text, metadata={"source": source, "start": 10, "end": 10 + len(text)}), 0.9, rank)
            for rank, (source, text) in enumerate(PASSAGES, 1)
        ][:k]


class Finding:
    def __init__(self, level, name, finding, remedy=""):
        self.level, self.name, self.finding, self.remedy = level, name, finding, remedy


class WellEnough:
    """What `rag_kit.ops.health.Health` shows of itself."""

    checks = (Finding("ok", "base", "here"), Finding("warning", f"index{EVIL}", "none", "Build one."))

    def _repr_html_(self):
        return "".join(f"<p>{escape(c.finding)} {escape(c.remedy)}</p>" for c in self.checks)
