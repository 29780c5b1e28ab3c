"""Writes results into the documentation, between markers, so that it only ever holds what a command printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..instruments import machine

PAGES = {"cpu": "benchmarks", "cuda": "benchmarks-gpu"}
INTRODUCTION = """\
# {title}

Tables, pictures and JSON here are what `python -m cce_inductor bench --docs docs` wrote; edit only what stands between
them.
"""


@dataclass(frozen=True)
class Section:
    """One part of the results: goes to the screen, to the output folder and, if wanted, to the documentation."""

    name: str
    text: str  # markdown
    data: Any  # for JSON
    plot: Path | None = None
    page: str = ""  # of the documentation; empty: the device's benchmarks


def markers(name: str) -> tuple[str, str]:
    """The comments around a section in a document."""
    return f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"


def replaced(document: str, name: str, text: str) -> str:
    """`document` with `text` between the markers of `name`, which are added at the end if they are not there.

    Raises ValueError if only one of them is there.
    """
    begin, end = markers(name)
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin not in document and end not in document:
        return f"{document.rstrip()}\n\n{block}\n"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{begin} and {end} are not a pair in this order")
    return before + block + after


def file_name(device: str, name: str) -> str:
    """Of a section's JSON: the section that has the device's name is the main table."""
    return f"{device}.json" if name == device else f"{device}-{name}.json"


def write(section: Section, folder: Path, device: str, command: str) -> None:
    """Put a section into folder/PAGE.md, its JSON and picture into folder/PAGE/; PAGE is its own or the device's."""
    page = section.page or PAGES[device]
    inside = folder / page
    inside.mkdir(parents=True, exist_ok=True)
    text = f"`{command}`\n\n{section.text}"
    if section.plot is not None:
        picture = f"{section.name}{section.plot.suffix}"
        shutil.copyfile(section.plot, inside / picture)
        text += f"\n\n![{section.name}]({page}/{picture})"
    save(section, inside / file_name(device, section.name))
    document = folder / f"{page}.md"
    before = document.read_text() if document.exists() else INTRODUCTION.format(title=page.split("-")[0].capitalize())
    document.write_text(replaced(before, section.name, text))


def publish(sections: Iterable[Section], command: str, device: str, out: Path, docs: Path | None = None) -> None:
    """Print each section as soon as it is there and put it into the folder `out`; into the documentation in `docs` too.

    command: how the results can be made again. Raises ValueError where a page of `docs` has half a pair of markers.
    """
    about = machine.describe(device)
    for section in sections:
        finished = replace(
            section,
            text=f"{machine.sentence(about)}\n\n{section.text}",
            data={"command": command, "machine": about, section.name: section.data},
        )
        print(f"## {finished.name}\n\n{finished.text}\n", flush=True)
        (out / f"{finished.name}.md").write_text(finished.text + "\n")
        save(finished, out / file_name(device, finished.name))
        if docs:
            write(finished, docs, device, command)


def save(section: Section, path: Path) -> None:
    """Its data, as JSON."""
    path.write_text(json.dumps(section.data, indent=1) + "\n")
