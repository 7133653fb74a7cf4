"""Search pages by what is seen on them: ColQwen2.5's vectors from this server, kept and searched in Qdrant.

    uv run mlx-embeddings-server --model vidore/colqwen2.5-v0.2 &
    scripts/qdrant-docker.sh               # or --embedded below: Qdrant inside this process, without Docker
    uv run python examples/colqwen2.5_qdrant.py "How large is the bathroom?" --save-maps maps

1. Every image becomes some hundreds of vectors: one for each patch of the page, in rows and columns, and a few more.
2. Qdrant keeps a page's vectors three times: all of them, and their means along the rows and along the columns of
   patches. The means are a few dozen, and the only ones that are indexed.
3. A query becomes one vector for each of its tokens. Qdrant takes candidates by the means, and orders them by all
   vectors with MaxSim: for each vector of the query the likest one of the page, and the sum of these.

Run it again, and only new and changed pages are embedded; those whose file is gone are removed. An interrupted run goes
on where it was. Exit status: 0; 1 when it could not go on; 3 when some images were skipped; 130 when interrupted.
"""

import argparse
import base64
import hashlib
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from uuid import NAMESPACE_URL, uuid5

import httpx
import numpy as np
from numpy.typing import NDArray
from openai import APIConnectionError, APIError, APIStatusError, OpenAI
from PIL import Image, ImageOps
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException
from tqdm import tqdm

IMAGES = Path(__file__).parent.parent / "images"
QUERIES = ["How large is the bathroom?", "Where do I change for the airport?", "a sailing boat at sunset"]
MEDIA_TYPES = {
    ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif", ".bmp": "bmp", ".tif": "tiff",
    ".tiff": "tiff",
}  # fmt: skip
CANDIDATES = 100  # pages that the means along the rows propose, and as many along the columns
HELP = """
What this example needs (--server and --qdrant say where it is, if not on this machine's usual port):
  uv run mlx-embeddings-server --model vidore/colqwen2.5-v0.2
  scripts/qdrant-docker.sh      or pass --embedded, which needs no Qdrant server"""

Vectors = NDArray[np.float32]


# Pages and queries to vectors, by the embeddings server.


@dataclass(frozen=True)
class Grid:
    """Which of a page's vectors are its patches: rows x columns of them, row by row, from the offset-th on."""

    rows: int
    columns: int
    offset: int

    def patches(self, vectors: Vectors) -> Vectors:
        found = vectors[self.offset : self.offset + self.rows * self.columns]
        return found.reshape(self.rows, self.columns, -1)  # [rows, columns, dimensions]


@dataclass(frozen=True)
class Embedding:
    vectors: Vectors  # [vectors, dimensions], each of length 1
    grid: Grid | None  # None: of a text


class Server:
    """The embeddings server, by OpenAI's client: it tries again by itself when the server has no room (429)."""

    def __init__(self, url: str, api_key: str) -> None:
        self.client = OpenAI(base_url=f"{url.rstrip('/')}/v1", api_key=api_key, timeout=600, max_retries=20)
        try:
            served = self.client.with_options(timeout=10, max_retries=0).models.list().data
        except APIConnectionError:
            sys.exit(f"No embeddings server answers at {url}.{HELP}")
        facts = {model.id: model.model_extra or {} for model in served}  # what the server adds to OpenAI's fields
        fit = [id for id in facts if facts[id].get("output") == "multi_vector" and "image" in facts[id]["modalities"]]
        if not fit:
            sys.exit(f"{url} serves {', '.join(facts)}: no model that makes multi-vectors of images.{HELP}")
        self.model, self.dimensions = fit[0], int(facts[fit[0]]["dimensions"])

    def embed(self, inputs: Sequence[object], input_type: str) -> list[Embedding]:
        reply = self.client.embeddings.create(
            model=self.model,
            input=cast("Any", inputs),  # the client's types know texts only, but it sends what it is given
            # Asked for by name, base64 comes back as it is: else the client makes 100,000 Python floats of a page.
            encoding_format="base64",
            extra_body={"input_type": input_type, "include": ["patches"]},
        )
        return [self.decode(cast("Any", item.embedding), item.model_extra or {}) for item in reply.data]

    @staticmethod
    def decode(embedding: str, extra: dict[str, Any]) -> Embedding:
        vectors = np.frombuffer(base64.b64decode(embedding), "<f4").reshape(extra["shape"])
        return Embedding(vectors, Grid(**extra["patches"]) if extra.get("patches") else None)


def reason(error: APIError) -> str:
    return str(error.body["message"]) if isinstance(error.body, dict) and "message" in error.body else error.message


def with_means(page: Embedding) -> dict[str, list[list[float]]]:
    """All vectors, and two smaller sets: the patches' means, with the few vectors around the patches as they are.

    As in https://qdrant.tech/documentation/tutorials-search-engineering/pdf-retrieval-at-scale/. The server makes means
    too (`"pool": "rows"`), but all vectors are here already: it saves embedding each page again.
    """
    assert page.grid is not None
    start, end = page.grid.offset, page.grid.offset + page.grid.rows * page.grid.columns
    sets = {"original": page.vectors}
    for name, axis in (("rows", 1), ("columns", 0)):
        means = page.grid.patches(page.vectors).mean(axis=axis)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        sets[name] = np.concatenate([page.vectors[:start], means, page.vectors[end:]])
    return {name: vectors.tolist() for name, vectors in sets.items()}


# Vectors to Qdrant.


def connect_qdrant(url: str, embedded: Path | None) -> QdrantClient:
    if embedded:
        try:
            return QdrantClient(path=str(embedded))
        except RuntimeError:
            sys.exit(f"Another program uses the embedded Qdrant in {embedded}.")
    try:
        httpx.get(f"{url.rstrip('/')}/readyz", timeout=10).raise_for_status()
    except httpx.HTTPError:
        sys.exit(f"No Qdrant answers at {url}.{HELP}")
    return QdrantClient(url=url, port=None, timeout=120)  # the port is the URL's


def open_collection(qdrant: QdrantClient, name: str, server: Server) -> None:
    def multi_vector(**options: Any) -> models.VectorParams:
        comparator = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        # Of vectors of length 1 the dot product is the cosine: Qdrant need not normalise them once more.
        metric = models.Distance.DOT
        return models.VectorParams(size=server.dimensions, distance=metric, multivector_config=comparator, **options)

    made_of = {"model": server.model, "dimensions": server.dimensions}
    if not qdrant.collection_exists(name):
        # No graph over all patches of all pages (m=0): it would be huge, and is not needed to order some candidates.
        original = multi_vector(on_disk=True, hnsw_config=models.HnswConfigDiff(m=0))
        vectors = {"original": original, "rows": multi_vector(), "columns": multi_vector()}
        qdrant.create_collection(name, vectors_config=vectors, metadata=made_of)
    found = qdrant.get_collection(name).config.metadata
    if found != made_of:
        sys.exit(f"The collection {name!r} is of {found or 'unknown'}, not of {made_of}: choose another --collection.")


def embed_pages(server: Server, paths: Sequence[Path]) -> list[Embedding | None]:
    """In order. None is an image that the server does not take; the user is told which, and why."""
    inputs = []
    for path in paths:
        data = base64.b64encode(path.read_bytes()).decode()
        inputs.append({"image": f"data:image/{MEDIA_TYPES[path.suffix.lower()]};base64,{data}"})
    try:
        return list(server.embed(inputs, "document"))
    except APIStatusError as error:
        if error.status_code not in (400, 413):
            raise
        if len(paths) > 1:  # each by itself tells which of them it is
            return [embedding for path in paths for embedding in embed_pages(server, [path])]
        tqdm.write(f"Skipped {paths[0]}: {reason(error)}", file=sys.stderr)
        return [None]


def pages_of(qdrant: QdrantClient, collection: str) -> dict[str, dict[str, Any]]:
    """The payload of every page by its id."""
    pages: dict[str, dict[str, Any]] = {}
    offset = None
    while True:
        records, offset = qdrant.scroll(collection, limit=1000, offset=offset)
        pages |= {str(record.id): record.payload or {} for record in records}
        if offset is None:
            return pages


def index(server: Server, qdrant: QdrantClient, collection: str, folder: Path, batch_size: int) -> int:
    """Bring the collection up to date with the folder. Returns how many images were skipped."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in MEDIA_TYPES and path.is_file()]
    if not paths:
        sys.exit(f"There are no images in {folder}.")
    ids = {path: str(uuid5(NAMESPACE_URL, path.as_uri())) for path in paths}
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    known = pages_of(qdrant, collection)
    fresh = [path for path in paths if known.get(ids[path], {}).get("sha256") != hashes[path]]
    skipped, started = set(), time.perf_counter()
    with tqdm(total=len(fresh), unit="page", desc="embedding", disable=None) as progress:
        for batch in (fresh[start : start + batch_size] for start in range(0, len(fresh), batch_size)):
            points = []
            for path, page in zip(batch, embed_pages(server, batch), strict=True):
                if page is None or page.grid is None:
                    skipped.add(path)
                    continue
                payload = {"file": str(path), "sha256": hashes[path], "grid": asdict(page.grid)}
                points.append(models.PointStruct(id=ids[path], vector=cast("Any", with_means(page)), payload=payload))
            # A page is some 2 MB of JSON, and Qdrant takes 32 MB at once.
            qdrant.upload_points(collection, points, batch_size=4, wait=True)
            progress.update(len(batch))

    present = {ids[path] for path in paths if path not in skipped}
    here = {id for id, payload in known.items() if Path(payload["file"]).is_relative_to(folder)}
    if gone := here - present:
        qdrant.delete(collection, models.PointIdsList(points=list(gone)))
    print(
        f"{folder}: {len(fresh) - len(skipped)} pages embedded in {time.perf_counter() - started:.1f} s, "
        f"{len(paths) - len(fresh)} indexed already, {len(gone)} removed, {len(skipped)} skipped"
    )
    return len(skipped)


# Queries to pages, and what on them is similar.


def search(qdrant: QdrantClient, options: argparse.Namespace, query: str, vectors: Vectors) -> None:
    count, started = qdrant.count(options.collection).count, time.perf_counter()
    candidates, wanted = max(CANDIDATES, options.limit), vectors.tolist()
    by_means = [models.Prefetch(query=wanted, using=name, limit=candidates) for name in ("rows", "columns")]
    hits = qdrant.query_points(
        options.collection,
        query=wanted,
        using="original",
        prefetch=None if options.one_stage else by_means,
        limit=options.limit,
        with_vectors=["original"] if options.save_maps else False,
    ).points
    spent = (time.perf_counter() - started) * 1000
    two = f"two stages, {min(candidates, count)} candidates by each of the means"
    stages = "one stage" if options.one_stage else two
    print(f"\n{query}\n  ({count} pages, {stages}, {spent:.0f} ms)\n  rank   score  page")
    for rank, hit in enumerate(hits, start=1):
        path = Path((hit.payload or {})["file"])
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        print(f"  {rank:4}  {hit.score:6.2f}  {shown}")
    if options.save_maps:
        save_maps(options.save_maps, query, vectors, hits)


def save_maps(folder: Path, query: str, vectors: Vectors, hits: Sequence[models.ScoredPoint]) -> None:
    """A picture of each hit. A patch is as similar to the query as to the one of its tokens that is most like it."""
    # A query is "Query: " (two tokens), its text, and ten tokens of padding, as ColQwen2.5 was trained: only the text's
    # say where something is.
    content = vectors[2:-10] if len(vectors) > 12 else vectors
    folder = folder / (re.sub(r"\W+", "-", query.lower()).strip("-")[:60] or "query")
    folder.mkdir(parents=True, exist_ok=True)
    for rank, hit in enumerate(hits, start=1):
        payload = hit.payload or {}
        patches = Grid(**payload["grid"]).patches(np.array(cast("Any", hit.vector)["original"], np.float32))
        path = Path(payload["file"])
        with Image.open(path) as file:
            page = ImageOps.exif_transpose(file).convert("RGB")
        overlay(page, (patches @ content.T).max(axis=2)).save(folder / f"{rank}_{path.stem}.png")
    print(f"  maps in {folder}")


def overlay(page: Image.Image, similarity: Vectors) -> Image.Image:
    """The page under its similarities [rows, columns]: the least similar stays as it is, the most similar is red."""
    heat = (similarity - similarity.min()) / max(float(np.ptp(similarity)), 1e-6)
    heat = np.asarray(Image.fromarray(heat).resize(page.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours = np.array([(40, 60, 160), (30, 150, 170), (240, 200, 60), (215, 48, 39)])
    tint = np.stack([np.interp(heat, (0, 0.35, 0.7, 1), channel) for channel in colours.T], axis=-1)
    opacity = 0.75 * heat[..., None] ** 2
    return Image.fromarray((np.asarray(page) * (1 - opacity) + tint * opacity).round().astype(np.uint8))


# The command line.


def parse() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=layout)
    add = parser.add_argument
    add("queries", nargs="*", metavar="QUERY", default=QUERIES, help="what to look for (default: three examples)")
    add("--images", type=Path, default=IMAGES, metavar="DIR", help="the pages, in subfolders too (%(default)s)")
    add("--server", default="http://localhost:8888", metavar="URL", help="the embeddings server (%(default)s)")
    add("--api-key", default="none", metavar="KEY", help="the server's, if it asks for one")
    add("--qdrant", default="http://localhost:6333", metavar="URL", help="the Qdrant server (%(default)s)")
    nowhere = "keep the vectors in this folder instead (.qdrant, if none is named); queries stand before this flag"
    add("--embedded", type=Path, nargs="?", const=Path(".qdrant"), metavar="DIR", help=nowhere)
    add("--collection", default="pages", metavar="NAME", help="Qdrant's name for the whole (%(default)s)")
    add("--batch-size", type=int, default=4, metavar="N", help="pages in a request to the server (%(default)s)")
    add("--limit", type=int, default=5, metavar="N", help="hits for each query (%(default)s)")
    add("--one-stage", action="store_true", help="compare all vectors of all pages: exact, but slow with many pages")
    add("--save-maps", type=Path, metavar="DIR", help="draw what of each hit is similar to the query")
    options = parser.parse_args()
    if options.embedded and " " in options.embedded.name and not options.embedded.exists():
        parser.error(f"--embedded would make a folder {options.embedded.name!r}: write the query before --embedded")
    if min(options.batch_size, options.limit) < 1:
        parser.error("--batch-size and --limit must be 1 or more")
    return options


def run(options: argparse.Namespace) -> int:
    server = Server(options.server, options.api_key)
    with closing(connect_qdrant(options.qdrant, options.embedded)) as qdrant:
        open_collection(qdrant, options.collection, server)
        skipped = index(server, qdrant, options.collection, options.images.resolve(), options.batch_size)
        for query, embedding in zip(options.queries, server.embed(options.queries, "query"), strict=True):
            search(qdrant, options, query, embedding.vectors)
    return 3 if skipped else 0


def main() -> int:
    options = parse()
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nInterrupted. What is indexed stays: run it again to go on.", file=sys.stderr)
        return 130
    except APIError as error:
        sys.exit(f"The embeddings server at {options.server}: {reason(error)}")
    except ApiException as error:
        sys.exit(f"Qdrant at {options.qdrant}: {error}")


if __name__ == "__main__":
    sys.exit(main())
