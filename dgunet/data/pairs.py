"""Which images of a folder belong together, and which are trained on."""

import hashlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dgunet.data.images import image_size
from dgunet.data.layouts import LISTS, USUAL, Layout, check_layout, find_layout, match_images, read_list
from dgunet.data.packed import Packed, _PackedImage, list_packed
from dgunet.runtime.errors import UserError, one_line, shorten_list
from dgunet.runtime.files import IMAGE_SUFFIXES, escaped, nfc

SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # which operating systems add to folders


class Pair(NamedTuple):
    """A degraded image and its ground truth."""

    name: str
    input: Path | Packed
    target: Path | Packed


def list_images(folder: str | Path, report: bool = True) -> list[Path]:
    """Images directly inside a folder, naturally sorted (img2 before img10): files with the suffix of an image.

    Args:
        folder: path of the folder.
        report: whether to list other files on stderr (see `report_skipped_files`).

    Raises:
        UserError: no such folder, no image in it, or two whose names differ in Unicode form alone.
    """
    from natsort import natsorted

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder.absolute()}; check the path, or see the task's README for the data layout")
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    paths = natsorted((path for path in there if path.suffix.lower() in IMAGE_SUFFIXES), key=lambda path: path.name)
    if not paths:
        raise UserError(f"no images in {folder.absolute()} (recognised suffixes: {', '.join(sorted(IMAGE_SUFFIXES))})")
    index_by_name((path.name, path) for path in paths)
    if report:
        report_skipped_files(folder, [path for path in there if path.suffix.lower() not in IMAGE_SUFFIXES])
    return paths


_reported: set[Path] = set()  # folders


def report_skipped_files(folder: Path, others: list[Path]):
    """Print once per folder, in a line on stderr, which files are skipped; not those of operating systems."""
    from natsort import natsorted

    others = [
        path for path in others if path.name.lower() not in SYSTEM_FILES and not path.name.startswith(("@", "__MACOSX"))
    ]
    if others:
        names = natsorted(one_line(f"{path.name}/" if path.is_dir() else path.name) for path in others)
        report_once(folder, f"note: skipped in {one_line(str(folder))}, not images: {shorten_list(names)}")


def report_once(folder: Path, note: str):
    """Print a note on a folder on stderr, the first one of each process that is not of torchrun's further ones."""
    first = os.environ.get("RANK", "0") == "0"
    if first and folder.absolute() not in _reported:
        _reported.add(folder.absolute())
        print(note, file=sys.stderr)


def index_by_name(named: Iterable[tuple[str, Path | Packed]]) -> dict[str, Path | Packed]:
    """A dict of the sources by name, normalised to Unicode's form NFC.

    Raises:
        UserError: two sources of one name.
    """
    found: dict[str, Path | Packed] = {}
    for name, source in named:
        if (key := nfc(name)) in found:
            same = f"{escaped(found[key])} and {escaped(source)} have the same name"
            raise UserError(f"{same} (in Unicode form NFC); keep one of the two")
        found[key] = source
    return found


def images_by_name(folder: str | Path, report: bool = True) -> dict[str, Path]:
    """The images directly inside a folder by their names without suffix (in Unicode's form NFC), naturally sorted.

    Raises:
        UserError: as `list_images`; two images of one name.
    """
    return index_by_name((path.stem, path) for path in list_images(folder, report))


def find_pairs(
    root: str | Path,
    check_sizes: bool = True,
    *,
    target: str | Path | None = None,
    names: tuple[str, str] | None = None,
) -> list[Pair]:
    """Pairs of ``root/input`` and ``root/target``, matched by file name (without suffix), or in another layout.

    Layouts of published sets (`layouts.KNOWN`) are recognised, and named in a note on stderr. Names are compared in
    Unicode's form NFC, which a `Pair` has, since macOS and Linux write different forms.

    Args:
        root: the folder; or a file that scripts/pack_dataset.py made of it; or a list, a text or CSV file with two
            paths to a line, see `layouts.read_list`.
        check_sizes: read all headers and compare the sizes.
        target: the folder of the targets, where ``root`` is that of the inputs alone.
        names: patterns of the inputs and the targets in their folder, such as ``("*_input", "*_gt")``, see `layouts`.

    Raises:
        UserError: a missing or empty folder, an image without partner, two images of one name, two layouts; with
            ``check_sizes``, also a pair whose sizes differ or an image whose header shows that it is unsuitable.
    """
    from natsort import natsorted

    root = Path(root)
    packed = root.is_file() and root.suffix.lower() not in LISTS
    if root.is_file() and not packed:
        pairs = [Pair(*each) for each in read_list(root)]
        index_by_name((pair.name, pair.input) for pair in pairs)
    else:
        if packed:
            inputs, targets = (
                index_by_name((name, Packed(root, f"{side}/{name}")) for name in list_packed(root, side))
                for side in ("input", "target")
            )
            places = [root / "input", root / "target"]
        else:
            inputs, targets, places = _match_layout(root, Path(target) if target else root, names)
        for have, lack, place in ((inputs, targets, places[1]), (targets, inputs, places[0])):
            alone = [path for name, path in have.items() if name not in lack]
            if alone:
                more = f" (and {len(alone) - 1} more like it)" if len(alone) > 1 else ""
                raise UserError(f"{alone[0]} has no partner of the same name in {place}{more}; add or remove it")
        pairs = [Pair(name, inputs[name], targets[name]) for name in natsorted(inputs)]
    if not check_sizes:
        return pairs
    with ThreadPoolExecutor(1 if packed else 16) as pool:
        list(pool.map(pair_size, pairs))
    return pairs


def has_pairs(source: Path) -> bool:
    """Whether a path is that of pairs, rather than of images: of a list, or of a folder with a known layout."""
    if source.is_file():
        return source.suffix.lower() in LISTS
    return (source / "input").is_dir() or find_layout(source, source) is not None


def _match_layout(
    inputs: Path, targets: Path, names: tuple[str, str] | None
) -> tuple[dict[str, Path], dict[str, Path], list]:
    """The inputs and the targets in folders, by the names of their pairs, and where they are, for messages."""
    usual = USUAL if inputs == targets else Layout("*", "*")
    if names is None:
        layout, note = find_layout(inputs, targets) or (usual, "")
        if note and layout != usual:
            report_once(inputs, f"note: pairs in {one_line(str(inputs))}: {note}")
    else:
        layout = Layout(*names)
        check_layout(layout)
    sides, places = [], []
    for root, pattern in zip((inputs, targets), layout, strict=True):
        folder, _, last = pattern.rpartition("/")
        if last == "*" and "*" not in folder:
            sides.append(list(images_by_name(root / folder).items()))
            places.append(root / folder)
        else:
            found = match_images(root, pattern)
            if not found:
                raise UserError(f"no images {pattern} in {root.absolute()}; check the pattern and the path")
            sides.append(found)
            places.append(f"{root} ({pattern})")
    # Of two patterns that match an image, such as * and *_gt, the one that says more has it.
    twice = {path for _, path in sides[0]} & {path for _, path in sides[1]}
    if twice:
        literal = [len(pattern.replace("*", "")) for pattern in layout]
        if literal[0] == literal[1]:
            raise UserError(f"pairs of {layout}: {min(twice)} is both")
        less = literal.index(min(literal))
        sides[less] = [(name, path) for name, path in sides[less] if path not in twice]
    return *map(index_by_name, sides), places


def pair_size(pair: Pair) -> tuple[int, int]:
    """(height, width) of both images, from their headers; raises as `find_pairs` does."""
    a, b = image_size(pair.input), image_size(pair.target)
    if a != b:
        raise UserError(f"{pair.input} is {a[1]}x{a[0]} but {pair.target} is {b[1]}x{b[0]}; a pair must have one size")
    return a


def hold_out(items: list, count: int, source: str | Path) -> tuple[list, list]:
    """Split images or pairs into (training, validation): the last in natural order are held out.

    Neighbours in that order are often frames of one scene, so that at most one scene is in both parts.

    Args:
        items: images or pairs.
        count: how many to hold out at most; no more than a tenth of the items, but at least one.
        source: the folder or packed file, for the message.
    """
    if count < 1 or len(items) < 2:
        raise UserError(
            f"cannot hold out {count} of the {len(items)} images in {source} for validation; set "
            "TRAINING.VAL_HOLD_BACK, or TRAINING.VAL_DIR to a folder for validation"
        )
    count = min(count, max(len(items) // 10, 1))
    return items[:-count], items[-count:]


def exclude(items: list[Path | Packed | Pair], listing: str | Path) -> list:
    """Exclude the images or pairs that a text file lists, one name per line, with or without suffix.

    Names are compared in Unicode's form NFC. Patches and copies, which scripts/prepare_patches.py and make_demo_data.py
    name NAME_1, NAME_2, ..., are excluded with their image.

    Raises:
        UserError: no such file, it names none of the images, or all of them.
    """
    try:
        lines = [line.strip() for line in Path(listing).read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"TRAINING.EXCLUDE: cannot read {listing}; it is a text file with one name to a line"
        ) from error

    def stem(name: str) -> str:
        return nfc(Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name)

    listed = set(map(stem, lines))
    names = [item.key if isinstance(item, Packed) else item.name for item in items]
    stems = [{stem(name), re.sub(r"_\d+$", "", stem(name))} for name in names]
    left = [item for item, own in zip(items, stems, strict=True) if not own & listed]
    if len(left) in (0, len(items)):
        which = "none" if left else "all"
        raise UserError(
            f"TRAINING.EXCLUDE: {listing} names {which} of the {len(items)} images, as {names[0]}; correct it, "
            'or exclude nothing with TRAINING.EXCLUDE ""'
        )
    return left


def fingerprint(items: Sequence[Path | Packed | Pair | int]) -> dict[str, Tensor | bool]:
    """Names and sizes that identify training data, independent of their location, for `changed_items`.

    Sizes are in bytes for files, in pixels for packed images (``packed``); numbered samples have none.
    """
    names, sizes, packed = [], [], False
    for name, source in _sources(items):
        packed = isinstance(source, Packed)
        names.append(_digest(name))
        sizes.append(0 if source is None else _PackedImage(source).size if packed else os.stat(source).st_size)
    return {"names": torch.tensor(names), "sizes": torch.tensor(sizes), "packed": packed}


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little", signed=True)


def changed_items(items: Sequence[Path | Packed | Pair | int], then: dict[str, Tensor | bool]) -> str:
    """In words, how training data differ from those of the `fingerprint` ``then``; empty if they do not."""
    now = fingerprint(items)
    before = dict(zip(then["names"].tolist(), then["sizes"].tolist(), strict=True))
    names, after = {}, {}
    for (name, _), key, size in zip(_sources(items), now["names"].tolist(), now["sizes"].tolist(), strict=True):
        if key not in before and (old := _digest(unicodedata.normalize("NFD", name))) in before:
            key = old  # of a run before 0.3, when names were not normalised
        names[key], after[key] = name, size
    new = [names[key] for key in after if key not in before]
    comparable = now["packed"] == then["packed"]
    other = [names[key] for key in after if comparable and before.get(key, after[key]) != after[key]]
    gone = len(before.keys() - after.keys())
    parts = [f"{len(some)} {what} ({some[0]}{', ...' if len(some) > 1 else ''})"
            for some, what in ((new, "new"), (other, "of another size")) if some]  # fmt: skip
    return ", ".join(parts + ([f"{gone} gone"] if gone else []))


def _sources(items: Sequence[Path | Packed | Pair | int]) -> Iterator[tuple[str, Path | Packed | None]]:
    """(name, source) of all images; a name is the same in a folder and in its packed file."""
    for item in items:
        if isinstance(item, Pair):
            yield f"input/{item.name}", item.input
            yield f"target/{item.name}", item.target
        elif isinstance(item, int):
            yield f"sample {item}", None
        else:
            yield nfc(item.key if isinstance(item, Packed) else item.name), item


def find_images(root: str | Path) -> list[Path | Packed]:
    """The images of a folder, or of a file that scripts/pack_dataset.py made of it; raises as `list_images` does."""
    root = Path(root)
    if not root.is_file():
        return list_images(root)
    return list(index_by_name((name, Packed(root, name)) for name in list_packed(root, "/")).values())
