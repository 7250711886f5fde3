"""One web page that shows photographs before and after, with a slider; it needs no server and no internet."""

import html
from pathlib import Path
from urllib.parse import quote

from dgunet.data.photos import Photo, read_photo, write_photo
from dgunet.data.transforms import to_uint8
from dgunet.runtime.files import atomic_write

COMPARISON = "compare.html"
SHOWN_BY_BROWSERS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}

_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Before and after</title>
<style>
body { margin: 0 auto; padding: 1em; max-width: 1200px; font: 16px sans-serif; background: #222; color: #eee }
figure { margin: 0 0 2em } figcaption { margin: .3em 0; overflow-wrap: anywhere }
.pair { position: relative; line-height: 0; --at: 50% } .pair img { width: 100%; height: auto }
.before { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0) }
.pair::after { content: ""; position: absolute; inset: 0 auto 0 var(--at); width: 2px; background: #fff }
input { width: 100%; margin: .5em 0 0 }
</style>
FIGURES
<script>
for (const input of document.querySelectorAll("input"))
    input.oninput = () => input.previousElementSibling.style.setProperty("--at", input.value + "%")
</script>
</html>
"""
_FIGURE = """<figure><figcaption>{name}: before on the left, restored on the right</figcaption>
<div class="pair"><img src="{after}" alt="{name}, restored" loading="lazy">
<img class="before" src="{before}" alt="{name}, before" loading="lazy"></div>
<input type="range" value="50" min="0" max="100" step="0.5"
aria-label="{name}: how much of the photograph is shown as it was"></figure>"""


def write_comparison(page: Path, pairs: list[tuple[Path, Path]]) -> Path:
    """Write the page for pairs of a photograph and its restored image, in the page's folder or below.

    The page refers to the files, which so have to stay where they are. Of photographs that browsers do not show, a copy
    of 8 bits is written to the folder ``before`` beside the page.

    Raises:
        UserError: a photograph that cannot be read.
    """
    figures = []
    for photograph, restored in pairs:
        below = restored.relative_to(page.parent)
        shown = photograph.absolute()
        if photograph.suffix.lower() not in SHOWN_BY_BROWSERS:
            shown = (page.parent / "before" / below).with_suffix(".png")
            write_photo(shown, _plain(read_photo(photograph)), f"{photograph.name}, as it was")
        before = quote(shown.relative_to(page.parent).as_posix()) if page.parent in shown.parents else shown.as_uri()
        after, name = quote(below.as_posix()), html.escape(below.as_posix())
        figures.append(_FIGURE.format(name=name, after=after, before=html.escape(before)))
    with atomic_write(page) as temporary:
        text = _PAGE.replace("FIGURES", "\n".join(figures))
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _plain(photo: Photo) -> Photo:
    return Photo(to_uint8(photo.pixels / 65535) if photo.pixels.itemsize == 2 else photo.pixels)
