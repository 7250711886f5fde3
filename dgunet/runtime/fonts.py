"""Text in figures, whatever its characters."""

import textwrap

from dgunet.runtime.errors import one_line


def set_title(figure, text: str):
    """Put a text above a figure that may hold any characters, such as a file's name. It is no formula.

    What the usual font lacks is drawn with another installed font, or escaped (``\\u7167``) where none has it.
    """
    text, families = drawable(text)
    em = int(figure.get_figwidth() * 72 / 12)  # so many characters fit into a line, even of those as wide as high
    if len(text) > 2 * em:
        text = f"{text[:em]}...{text[3 - em :]}"
    figure.suptitle(textwrap.fill(text, em), parse_math=False, family=families)


def drawable(text: str) -> tuple[str, list[str]]:
    """A text that Matplotlib can draw, in a line, and the font families to draw it with."""
    import matplotlib.font_manager as manager

    def missing_glyphs(characters: set[str], path: str) -> set[str]:
        font = manager.get_font(path)
        return {c for c in characters if not (font.scalable and font.get_char_index(ord(c)))}

    text, usual = one_line(text), manager.FontProperties()
    lack, families = missing_glyphs(set(text), manager.findfont(usual)), list(usual.get_family())
    for font in manager.fontManager.ttflist if lack else ():
        regular = font.style == "normal" and manager.weight_dict.get(font.weight, font.weight) == 400
        if regular and not font.name.startswith("Last Resort"):  # has an empty box for every character
            try:
                still = missing_glyphs(lack, font.fname)
            except (OSError, RuntimeError):  # was removed, or is damaged
                continue
            if still != lack:
                families.append(font.name)
                lack = still
    return "".join(c.encode("unicode_escape").decode() if c in lack else c for c in text), families
