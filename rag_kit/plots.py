"""Pictures in which every character can be read, with or without a Chinese font on the machine.

Knows matplotlib's fonts; knows nothing of what is drawn.
"""

from __future__ import annotations

from functools import cache

# One of these is at hand on most systems with Chinese; any other font that has the characters will do.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "Heiti SC",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "SimHei", "Arial Unicode MS",
)  # fmt: skip
PROBE = "中文与汉語"


def style() -> str | None:
    """Draw from now on with a font that has Chinese; return its name, None where the machine has none.

    Then `legible` says with other letters what could not be shown.
    """
    import matplotlib.pyplot as plt

    found = chinese_font()
    plt.rcParams["font.family"] = ["DejaVu Sans", *([found] if found else [])]
    plt.rcParams["axes.unicode_minus"] = True
    plt.rcParams["axes.spines.top"] = plt.rcParams["axes.spines.right"] = False
    return found


@cache
def chinese_font() -> str | None:
    """Return the family of a font at hand that has Chinese, None where there is none."""
    fonts = _fonts()
    order = [*(name for name in CHINESE if name in fonts), *fonts]
    return next((name for name in order if {ord(c) for c in PROBE} <= _characters(fonts[name])), None)


def legible(text: str) -> str:
    """Return `text` with what no font in use can show written in Latin letters (`蓝` as `Lan`).

    Characters without a transcription become `?`; the transcription is that of the package anyascii.
    """
    from anyascii import anyascii

    shown = _shown(chinese_font())
    letters = (c if c.isspace() or ord(c) in shown else anyascii(c).strip() for c in text)
    return "".join(part if part.isspace() or (part.isprintable() and part) else "?" for part in letters)


@cache
def _shown(chinese: str | None) -> frozenset[int]:
    return _characters(_fonts()["DejaVu Sans"]) | (_characters(_fonts()[chinese]) if chinese else frozenset())


@cache
def _fonts() -> dict[str, str]:
    """The font files at hand by family; without the one whose every character is a box."""
    from matplotlib import font_manager

    entries = sorted(
        font_manager.fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400)
    )
    families: dict[str, str] = {}
    for entry in entries:
        families.setdefault(entry.name, entry.fname)
    return {name: path for name, path in families.items() if not name.startswith("Last Resort")}


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font file that cannot be read shows nothing
        return frozenset()
