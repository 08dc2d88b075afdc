"""No box in place of a character: with a Chinese font on the machine, and without."""

import warnings

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_kit import plots

TITLE = "准确率：lora:蓝 − 基础模型 «naïve» 🙂"


@pytest.fixture(params=["as it is", "without a Chinese font"])
def machine(request, monkeypatch):
    if request.param != "as it is":
        monkeypatch.setattr(plots, "chinese_font", lambda: None)
    with mpl.rc_context():
        yield plots.chinese_font()


def drawn(text: str) -> list[str]:
    """Draw `text` on a picture and return what matplotlib complained of."""
    import matplotlib.pyplot as plt

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure, axes = plt.subplots()
        axes.set_title(text)
        figure.canvas.draw()
        plt.close(figure)
    return [str(one.message) for one in told if "Glyph" in str(one.message)]


def test_a_chinese_title_has_no_missing_glyph(machine):
    assert plots.style() == machine
    assert drawn(plots.legible(TITLE)) == []


def test_what_is_shown_where_no_font_has_it(monkeypatch):
    monkeypatch.setattr(plots, "chinese_font", lambda: None)
    assert plots.legible("lora:蓝 +0.5") == "lora:Lan +0.5"
    assert plots.legible("F1 − base") == "F1 − base"
    with mpl.rc_context({"font.family": ["DejaVu Sans"]}):  # whatever a test before has chosen
        assert drawn("蓝") != []  # so the check above can fail


def test_with_a_font_chinese_stays_chinese():
    if plots.chinese_font() is None:
        pytest.skip("no font with Chinese on this machine")
    assert plots.legible("lora:蓝") == "lora:蓝"


@given(st.text(max_size=30))
@settings(deadline=None)
def test_every_character_that_remains_can_be_shown(text):
    shown = plots._shown(plots.chinese_font())
    assert all(c.isspace() or ord(c) in shown for c in plots.legible(text))
