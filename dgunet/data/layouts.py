"""How pairs of images lie in folders: patterns of their names, those of published sets, and lists of pairs.

A pattern is a path below a folder, in which each ``*`` stands for a part of a name, or all of it: ``*_input``, or
``*/blur/*``. An input and a target whose ``*`` stand for the same are a pair; its name is these parts, joined by ``-``.
"""

import csv
import glob
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from dgunet.runtime.errors import UserError
from dgunet.runtime.files import IMAGE_SUFFIXES, nfc


class Layout(NamedTuple):
    """The patterns of inputs and of targets, in one folder or each in one of its own."""

    input: str
    target: str

    def __str__(self) -> str:
        return f"{self.input} with {self.target}"


USUAL = Layout("input/*", "target/*")
GOPRO = Layout("*/blur_gamma/*", "*/sharp/*")  # its raw scenes
GOPRO_LINEAR = Layout("*/blur/*", "*/sharp/*")  # of the same sharp frames, averaged without the camera's response
KNOWN = (
    GOPRO,
    GOPRO_LINEAR,
    *(Layout(f"{input}/*", f"{target}/*") for input, target in (
        ("blur", "sharp"), ("blurry", "sharp"), ("rain", "norain"), ("rainy", "clean"), ("noisy", "clean"),
        ("hazy", "clear"), ("lq", "gt"), ("input", "gt"), ("rain", "gt"), ("noisy", "gt"), ("hazy", "gt"),
    )),
    Layout("rain/rain-*", "norain/norain-*"),
    Layout("rain-*", "norain-*"),
    Layout("*_input", "*_gt"),
    Layout("*_input", "*_target"),
    Layout("*_lq", "*_gt"),
    Layout("*_noisy", "*_clean"),
    Layout("*_real", "*_mean"),  # PolyU and CC15, of several exposures
)  # fmt: skip
LISTS = (".txt", ".csv", ".tsv")  # suffixes of files with two paths to a line


def check_layout(layout: Layout):
    """Raise a UserError where two patterns cannot name pairs."""
    if not 0 < layout.input.count("*") == layout.target.count("*") or any("**" in part for part in layout):
        raise UserError(f"pairs of {layout}: both need a * for what they have in common, and as many")


def match_images(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """The images below a folder that a pattern matches: what its ``*`` stand for, joined by ``-``, and their paths."""
    *folders, last = pattern.split("/")
    whole_name = Path(last).suffix.lower() in IMAGE_SUFFIXES  # else the suffix may be any
    regex = re.compile("([^/]+)".join(map(re.escape, nfc(pattern).split("*"))))
    # What is beside a * is compared by the regex, in Unicode's form NFC.
    places = "/".join(["*" if "*" in folder else glob.escape(folder) for folder in folders] + ["*"])
    found = []
    for name in glob.glob(places, root_dir=root):
        stem, suffix = os.path.splitext(name)
        named = nfc(name if whole_name else stem).replace(os.sep, "/")
        if suffix.lower() in IMAGE_SUFFIXES and (match := regex.fullmatch(named)):
            found.append(("-".join(match.groups()), Path(root, name)))
    return found


def find_layout(inputs: Path, targets: Path) -> tuple[Layout, str] | None:
    """The one layout that a folder has, or two for inputs and targets, and a note on it; None where it has none.

    Raises:
        UserError: it has two, which both are named.
    """
    if inputs == targets:
        if (inputs / "input").is_dir() and (inputs / "target").is_dir():
            return USUAL, ""
        known = KNOWN
    else:
        known = [Layout("*", "*"), *(layout for layout in KNOWN if "/" not in "".join(layout))]
    found = {}
    for layout in known:
        sides = [match_images(root, part) for root, part in zip((inputs, targets), layout, strict=True)]
        names, others = (dict(side) for side in sides)
        if names.keys() & others.keys():
            found[layout] = {path for side in sides for _, path in side}
    if GOPRO in found and GOPRO_LINEAR in found:
        del found[GOPRO_LINEAR]
        note = f"; {GOPRO_LINEAR} is there, too: {how_to_choose(GOPRO_LINEAR)}"
    else:
        note = ""
    if len(found) > 1:
        one, other = list(found)[:2]
        where = inputs if inputs == targets else f"{inputs} and {targets}"
        raise UserError(f"{where}: pairs may be {one}, or {other}; {how_to_choose(one)}")
    for layout, paths in found.items():
        beside = {path for root in (inputs, targets) for _, path in match_images(root, "*")} - paths
        if "/" not in "".join(layout) and beside:
            return None  # a folder of images, some of which have such names
        return layout, f"{layout}{note}"
    return None


def how_to_choose(layout: Layout) -> str:
    pair = f"{{input: '{layout.input}', target: '{layout.target}'}}"
    return f"choose by TRAINING.PAIRS \"{pair}\" in training, --pairs '{layout.input}' '{layout.target}' elsewhere"


def read_list(path: Path) -> list[tuple[str, Path, Path]]:
    """The pairs that a text or CSV file lists: their names, inputs and targets.

    A line holds two paths, relative to the file's folder: the input's, and after a comma, a tab or a space the
    target's. Empty lines, those that begin with ``#``, and a first line ``input,target`` are skipped. A pair's name is
    that of its input, with the folders where several have the same.

    Raises:
        UserError: no such file, a line with more or less than two paths, a file that is not there, no pair at all, an
            input that is listed twice.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, a text file with the paths of an input and a target to a line") from error
    listed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        separator = next((mark for mark in ",\t" if mark in line), None)
        words = [word.strip() for word in next(csv.reader([line], delimiter=separator))] if separator else line.split()
        if not listed and [word.lower() for word in words] == ["input", "target"]:
            continue
        if len(words) != 2:
            raise UserError(f"{path}, line {number}: {line.strip()!r:.100} are not the paths of an input and a target")
        files = [path.parent / word for word in words]
        for file in files:
            if not file.is_file():
                raise UserError(f"{path}, line {number}: no file {file}; paths are relative to the list's folder")
        listed.append((Path(words[0]), *files))
    if not listed:
        raise UserError(f"{path} lists no pairs; a line holds the paths of an input and a target")
    count = Counter(nfc(short.stem) for short, _, _ in listed)
    names = [short if count[nfc(short.stem)] > 1 else Path(short.name) for short, _, _ in listed]
    names = ["-".join(part for part in name.with_suffix("").parts if part not in ("/", "..")) for name in names]
    return [(nfc(name), *files) for name, (_, *files) in zip(names, listed, strict=True)]
