"""What scripts/bench.py sends: the loads, and the inputs of their requests, the same in every process."""

import base64
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parents[1] / "images"
FRESH = "{fresh}"  # in every input; each request puts two words there, so that no cache has seen its inputs
VOCABULARY = """time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house service
friend father power hour game line end member law car city name president team minute idea body back parent face
level"""
WORDS = VOCABULARY.split()


@dataclass(frozen=True, slots=True)
class Load:
    inputs: int  # in a request
    connections: int
    bodies: int  # distinct requests, sent in turn
    bare_batch: int  # inputs in one forward pass of the bare model
    words: tuple[int, int] | None  # in a text; None: the inputs are the images of images/
    prompted: bool = False  # the images have a text with them


TEXT_LOADS = {
    "short-1": Load(inputs=1, connections=1, bodies=200, bare_batch=1, words=(5, 15)),
    "short-32": Load(inputs=1, connections=32, bodies=200, bare_batch=32, words=(5, 15)),
    "passages": Load(inputs=32, connections=4, bodies=16, bare_batch=32, words=(80, 160)),
    "mixed": Load(inputs=32, connections=4, bodies=16, bare_batch=32, words=(5, 200)),
}
PAGE_LOADS = {
    "page-1": Load(inputs=1, connections=1, bodies=8, bare_batch=1, words=None, prompted=True),
    "pages": Load(inputs=8, connections=2, bodies=4, bare_batch=4, words=None, prompted=True),
}
PAPER_LOADS = {
    "paper-1": Load(inputs=1, connections=1, bodies=16, bare_batch=1, words=(480, 500)),
    "papers": Load(inputs=32, connections=2, bodies=4, bare_batch=8, words=(480, 500)),
}
PICTURE_LOADS = {
    "captions": Load(inputs=32, connections=4, bodies=16, bare_batch=32, words=(5, 15)),
    "picture-1": Load(inputs=1, connections=1, bodies=8, bare_batch=1, words=None),
    "pictures": Load(inputs=8, connections=4, bodies=4, bare_batch=8, words=None),
}
LOADS = TEXT_LOADS | PAGE_LOADS | PAPER_LOADS | PICTURE_LOADS


def loads_of(model: Mapping[str, Any]) -> list[str]:
    """Those that a served model is made for, by its entry in /v1/models."""
    if "image" in model.get("modalities", ()):
        return list(PAGE_LOADS if model["output"] == "multi_vector" else PICTURE_LOADS)
    return list(PAPER_LOADS if model.get("adapters") else TEXT_LOADS)


def bare_kind(model: Mapping[str, Any]) -> str:
    """Which of bench_bare.py's models is the bare one: `sentence-transformers`, `open_clip` or our own backend's."""
    if model.get("output") == "multi_vector":
        return "own"
    return "open_clip" if "image" in model.get("modalities", ()) else "sentence-transformers"


def request_inputs(name: str) -> Sequence[Sequence[str | dict[str, str]]]:
    """The inputs of each of a load's requests: texts, or the images of images/, with a text or alone."""
    rng, load = random.Random(name), LOADS[name]
    if load.words is None:
        pages = iter([page_item(file, load.prompted) for file in page_files()] * load.inputs * load.bodies)
        return [list(islice(pages, load.inputs)) for _ in range(load.bodies)]
    fewest, most = load.words

    def text() -> str:
        return " ".join([FRESH, *rng.choices(WORDS, k=rng.randint(fewest, most) - 2)])

    return [[text() for _ in range(load.inputs)] for _ in range(load.bodies)]


def page_files() -> list[Path]:
    return sorted(file for file in IMAGES.iterdir() if file.suffix in (".png", ".jpg"))


def page_item(file: Path, prompted: bool) -> dict[str, str]:
    kind = "png" if file.suffix == ".png" else "jpeg"
    content = base64.b64encode(file.read_bytes()).decode("ascii")
    if not prompted:
        return {"image": f"data:image/{kind};name={FRESH};base64,{content}"}
    return {"image": f"data:image/{kind};base64,{content}", "text": f"{FRESH} Describe the image."}


def fresh_words(turn: int) -> str:
    return f"{WORDS[turn % len(WORDS)]} {WORDS[turn // len(WORDS) % len(WORDS)]}"
