"""What Gradio does not have, for the demo: a handle between before and after, and cards to choose from."""

import contextlib
import hashlib
import html
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np

# Before and after, with one handle for pointer and keyboard; what was computed lies over the photograph with an opacity
# of the strength, which is y + s (x - y).
VIEW_JS = """
let at = 50, actual = false
const place = () => {
    for (const input of element.querySelectorAll("input"))
        if (input.type == "range") input.value = at
        else input.checked = actual
    element.style.setProperty("--at", at + "%")
    element.classList.toggle("actual", actual)
}
element.addEventListener("input", event => {
    if (event.target.type == "range") at = event.target.value
    else actual = event.target.checked
    place()
})
new MutationObserver(place).observe(element, {childList: true, subtree: true})  // of another image
"""
CARDS_JS = """
element.addEventListener("click", event => {
    const card = event.target.closest("button")
    if (card) trigger("click", {index: Number(card.dataset.index)})
})
"""
STRENGTH_JS = "s => document.querySelectorAll('#photo_view').forEach(e => e.style.setProperty('--strength', s))"
DOWNLOAD_JS = """file => {
    if (file) Object.assign(document.createElement("a"), {href: file.url, download: file.orig_name}).click()
}"""

CSS = """
.gradio-container {max-width: 1240px !important; overflow-x: hidden}
#own .wrap[data-upload-density] {font-size: 0}
#own .wrap[data-upload-density]::after {content: "Drop a photograph here, or click"; font-size: 1rem}
.gallery {max-width: 600px}
.gallery .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important}
.gallery .gallery-item, .gallery .thumbnail-item {width: 100% !important; height: auto; min-width: 0}
.html-container {padding: 0 !important}
.view .frame {max-height: 60vh; overflow: auto}
.view .pair {position: relative; line-height: 0; width: var(--width); margin: 0 auto}
.view .pair img {width: 100%; height: auto; max-width: none; margin: 0}
.view.actual .pair {width: fit-content; margin: 0} .view.actual .pair img {width: auto}
.view .pair .after {position: absolute; inset: 0; height: 100%;
    opacity: var(--strength, 1); clip-path: inset(0 0 0 var(--at, 50%))}
.view .pair.two::after {content: "◂▸"; position: absolute; inset: 0 auto 0 var(--at, 50%); width: 2px; background: #fff;
    box-shadow: 0 0 3px #000; display: grid; place-content: center; color: #fff; text-shadow: 0 0 4px #000;
    font-size: 28px; pointer-events: none}
.view .pair:focus-within {outline: 3px solid var(--color-accent); outline-offset: -3px}
.view input[type=range] {position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
    cursor: ew-resize; appearance: none; touch-action: pan-y}
.view input[type=range]::-webkit-slider-thumb {appearance: none; width: 2px}
.view input[type=range]::-moz-range-thumb {width: 2px; border: 0}
.view .below {display: flex; justify-content: space-between; font-size: .85em; width: var(--width); margin: .3em auto}
.cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(90px, 1fr)); gap: 8px}
.cards button {border: 2px solid var(--border-color-primary); border-radius: 8px; padding: 4px; text-align: left;
    font-size: .85em; line-height: 1.25; display: flex; flex-direction: column; gap: 4px; cursor: pointer; margin: 0}
.cards button[aria-pressed=true] {border-color: var(--color-accent)}
.cards img {width: 100%; aspect-ratio: 1; object-fit: cover; margin: 0; border-radius: 4px}
.cards mark {background: var(--color-accent); color: #fff; border-radius: 4px; padding: 0 .4em; align-self: start}
.status {min-height: 2.6em; font-size: .9em} .status p {margin: 0}
#download {overflow-wrap: anywhere}
.status progress {width: 100%; display: block; accent-color: var(--color-accent)}
@media (max-width: 640px) {.app {padding: 12px !important} h1 {font-size: 1.35em !important}}
"""


def cache_folder() -> Path:
    """A folder that the page may read; what is older than two hours is removed from it."""
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder(), "shown")
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.rglob("*.*"):
        with contextlib.suppress(OSError):  # another visit may have removed it
            if path.stat().st_mtime < time.time() - 7200:
                path.unlink()
    return folder


def image_url(image: np.ndarray) -> str:
    """Where the page finds an image, uint8."""
    from PIL import Image

    digest = hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()
    path = cache_folder() / f"{digest}.png"
    if not path.exists():
        Image.fromarray(image).save(path, compress_level=1)
    return "gradio_api/file=" + quote(str(path))


def draw_view(before: np.ndarray, after: np.ndarray | None = None, words: tuple[str, str] = ("before", "after")) -> str:
    """HTML of an image, and with ``after`` of both and a handle between them; uint8, of one size."""
    height, width = before.shape[:2]
    image = f'<img src="%s" alt="%s" width="{width}" height="{height}" decoding="sync" %s>'
    pair, below = image % (image_url(before), words[0], ""), ""
    if after is not None:
        pair += image % (image_url(after), words[1], 'class="after"')
        label = f"position of the handle between {words[0]} and {words[1]}"
        pair += f'<input type="range" min="0" max="100" value="50" aria-label="{label}">'
        actual = '<label><input type="checkbox"> actual size</label>'
        below = f'<div class="below"><span>◂ {words[0]}</span>{actual}<span>{words[1]} ▸</span></div>'
    width = f"min(100%, {52 * width / height:.0f}vh, {3 * width}px)"  # all of it visible, small ones enlarged
    pair = f'<div class="pair{" two" if after is not None else ""}">{pair}</div>'
    return f'<div style="--width: {width}"><div class="frame">{pair}</div>{below}</div>'


def draw_cards(cards: list[tuple[str, np.ndarray, bool]], chosen: int | None) -> str:
    """HTML of buttons: title, image (uint8), and whether it is the best guess."""
    return "".join(
        f'<button type="button" data-index="{k}" aria-pressed="{str(k == chosen).lower()}">'
        f'<img src="{image_url(image)}" alt=""><span>{html.escape(title)}</span>'
        f"{'<mark>best guess</mark>' if best else ''}</button>"
        for k, (title, image, best) in enumerate(cards)
    )
