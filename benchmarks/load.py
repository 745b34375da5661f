"""Load tests: many users of the page of `miniclip app`, and many images through the encoders.

    python benchmarks/load.py FLICKR8K --export EXPORT

Measures errors, response times and memory. FLICKR8K is a folder with Images/ and captions; without `--export` the
script first trains a model on the built-in scenes. Replaces the lines of the measured parts (`--only`) in `load.jsonl`
and writes `load.md` from it. Linux only: memory is read from /proc.

Each simulated user sends the requests that a browser would: search for a caption or, one time in five, upload an
image; wait for the answer; fetch the images found; look at them for an exponentially distributed time; and search
again. Each answer is compared with that of the index, queried directly.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from eval_memory import resident

from modeling_miniclip.search.embeddings_file import BLOCK
from modeling_miniclip.search.index import SCHEMA, VERIFIED, ImageIndex, Manifest, write_index
from modeling_miniclip.search.page.index_page import RESULTS
from modeling_miniclip.search.query import Query, embed_queries

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "load.jsonl"
TRAINING = HERE.parent / "train_miniclip.py"
# Captions and images that users search for; the captions are many more than the embeddings that the page keeps.
QUERIES, PICTURES = 5_000, 20
MOMENTS = (1 / 6, 1 / 2)  # memory is read after these fractions of the time
AT_ONCE = 6  # images that a browser fetches in parallel
# The server closes connections that were idle for 5 s. A browser then repeats its request; httpx, which also keeps
# connections for 5 s, would fail.
LIMITS = httpx.Limits(keepalive_expiry=2)


def miniclip(*argv: Any) -> list[str]:
    """A command line of `miniclip`."""
    return [sys.executable, "-m", "modeling_miniclip", *map(str, argv)]


# --- the page -------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """Something to search for, and the names of the images that are the right answer."""

    words: str
    picture: Path | None
    names: list[str]


@dataclass
class Results:
    """What all users experienced."""

    answers: list[float] = field(default_factory=list)  # seconds until the answer arrived
    pages: list[float] = field(default_factory=list)  # seconds until its images had arrived too
    files: int = 0
    errors: list[str] = field(default_factory=list)


def searches_of(index: ImageIndex, rng: random.Random) -> list[Search]:
    """Captions spread over an index, and some of its images, with the index's answer to each."""
    captions = [several[0] for several in index.entries["captions"].to_pylist() if several]
    texts = [captions[i] for i in np.linspace(0, len(captions) - 1, QUERIES).astype(int)]
    shown = [Path(index.entry(row)["path"]) for row in rng.sample(range(len(index)), PICTURES)]
    queries = [*(Query(text) for text in texts), *(Query(image=path) for path in shown)]
    embeddings = embed_queries(index, queries)
    names = [[Path(match.name).name for match in index.search(e, RESULTS)] for e in embeddings]
    return [Search(q.words or "", q.image, n) for q, n in zip(queries, names, strict=True)]


@contextmanager
def served(index: Path) -> Iterator[tuple[str, int]]:
    """Run the page; yields its address and process id."""
    process = subprocess.Popen(miniclip("app", index), stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        found = next((m[0] for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
        if found is None:
            sys.exit(f"the page ended with code {process.wait()}")
        yield found, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


class User:
    """One browser.

    Args:
        client: HTTP client of this user.
        search: index of the page's search function.
        results: results of all users, to which this user adds.
    """

    def __init__(self, client: httpx.AsyncClient, search: int, results: Results):
        self.client, self.search, self.results, self.session = client, search, results, uuid.uuid4().hex

    async def ask(self, asked: Search) -> None:
        """Search once and wait for the last image."""
        start = time.perf_counter()
        try:
            found = await self._answer(asked)
            answered = time.perf_counter() - start
            names = [picture["caption"].split("  ", 1)[1] for picture in found]
            if not same(names, asked.names):
                raise ValueError(f"wrong answer to {asked.words or asked.picture}: {names}")
            await self._fetch([picture["image"]["url"] for picture in found])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            self.results.errors.append(f"{type(error).__name__}: {error}"[:300])
        else:
            self.results.answers.append(answered)
            self.results.pages.append(time.perf_counter() - start)

    async def _answer(self, asked: Search) -> list[dict[str, Any]]:
        picture = None
        if asked.picture is not None:
            files = {"files": (asked.picture.name, asked.picture.read_bytes(), "image/jpeg")}
            upload = await self.client.post("/gradio_api/upload", files=files)
            picture = {"path": upload.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}
        data = [asked.words, picture, "", "", "", "", "", False]
        body = {"data": data, "fn_index": self.search, "session_hash": self.session}
        (await self.client.post("/gradio_api/queue/join", json=body)).raise_for_status()
        url = f"/gradio_api/queue/data?session_hash={self.session}"
        async with self.client.stream("GET", url) as stream:
            async for line in stream.raise_for_status().aiter_lines():
                event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if event.get("msg") == "process_completed":
                    if not event["success"]:
                        raise ValueError(f"the page failed: {event['output']}")
                    found: list[dict[str, Any]] = event["output"]["data"][0]
                    return found
        raise ValueError("no answer")

    async def _fetch(self, urls: list[str]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def fetch(url: str) -> None:
            async with gate:
                (await self.client.get(url)).raise_for_status()
            self.results.files += 1

        await asyncio.gather(*map(fetch, urls))


def same(names: list[str], expected: list[str]) -> bool:
    """Whether the images are the expected ones, in the expected order except for near ties."""
    return sorted(names) == sorted(expected) and sum(a != b for a, b in zip(names, expected, strict=True)) <= 4


async def crowd(address: str, pool: list[Search], args: argparse.Namespace, results: Results) -> None:
    """Run all users until the time is over; pending answers are still awaited."""
    end = time.perf_counter() + args.seconds
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        config = (await client.get("/config")).json()
    search = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 8)

    async def use(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=LIMITS) as client:
            user = User(client, search, results)
            await asyncio.sleep(rng.uniform(0, args.think))
            while time.perf_counter() < end:
                pictures = rng.random() < 0.2
                await user.ask(rng.choice([asked for asked in pool if (asked.picture is not None) == pictures]))
                await asyncio.sleep(rng.expovariate(1 / args.think) if args.think else 0)

    await asyncio.gather(*map(use, range(args.users)))


async def watched(pid: int, work: Any, seconds: float) -> list[float]:
    """Memory of a process in MiB at the start, at the `MOMENTS` and at the end of work that takes about `seconds`."""
    memory = [resident("VmRSS", pid)]
    task, start = asyncio.create_task(work), time.perf_counter()
    for fraction in MOMENTS:
        await asyncio.sleep(start + fraction * seconds - time.perf_counter())
        memory.append(resident("VmRSS", pid))
    await task
    return [*memory, resident("VmRSS", pid)]


def measure_page(index: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the page under load."""
    pool, results = searches_of(ImageIndex.open(index), random.Random(0)), Results()
    with served(index) as (address, pid):
        start = time.perf_counter()
        memory = asyncio.run(watched(pid, crowd(address, pool, args, results), args.seconds))
        seconds = time.perf_counter() - start
    for error in sorted(set(results.errors))[:5]:
        print(error, file=sys.stderr)
    quantiles = {name: np.quantile(times, [0.5, 0.99]).tolist() if times else None
                 for name, times in (("answer", results.answers), ("page", results.pages))}  # fmt: skip
    return {"images": len(ImageIndex.open(index)), "users": args.users, "think": args.think, "captions": QUERIES,
            "seconds": seconds, "searches": len(results.answers), "files": results.files,
            "errors": len(results.errors), "memory": memory, **quantiles}  # fmt: skip


# --- many images ----------------------------------------------------------------------------------------------------


def encode_and_look(export: str, files: list[Path], looks: tuple[int, ...]) -> list[float]:
    """Memory of this process in MiB while `encode_images` reads images, and at the end.

    Args:
        export: model to use.
        files: images to encode.
        looks: numbers of images after which to look at the memory.
    """
    from modeling_miniclip import MiniClipModel, encode_images
    from modeling_miniclip.utils.performance import keep_freed_memory

    keep_freed_memory()
    memory: list[float] = []

    def watched_files() -> Iterator[Path]:
        for number, file in enumerate(files):
            if number in looks:
                memory.append(resident("VmRSS"))
            yield file

    encode_images(MiniClipModel.from_pretrained(export), watched_files(), progress=False)
    return [*memory, resident("VmRSS")]


def measure_encoding(export: str, files: list[Path]) -> dict[str, Any]:
    """Measure `encode_images` in a separate process."""
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(encode_and_look, (export, files, (len(files) // 10,)))
    return {"images": len(files), "memory": memory, "seconds": time.perf_counter() - start}


def measure_indexing(export: str, files: list[Path], scratch: Path) -> dict[str, Any]:
    """Peak memory of `miniclip index` with a tenth of the images and with all of them."""
    peaks, start = [], time.perf_counter()
    for number, some in enumerate((files[: len(files) // 10], files)):
        part = scratch / f"part{number}"
        part.mkdir()
        for file in some:
            os.link(file, part / file.name)
        peaks.append(run(miniclip("index", export, part, "-o", scratch / f"{number}.index")))
    return {"images": len(files), "memory": peaks, "seconds": time.perf_counter() - start}


def many_files(images: Path, count: int, folder: Path) -> list[Path]:
    """Write `count` image files, copies of the images of a folder over and over."""
    originals = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    folder.mkdir()
    files = [folder / f"{number:06d}{originals[number % len(originals)].suffix}" for number in range(count)]
    for number, file in enumerate(files):
        shutil.copyfile(originals[number % len(originals)], file)
    return files


# --- many bytes -----------------------------------------------------------------------------------------------------


def measure_checksums(scratch: Path, rows: int) -> dict[str, Any]:
    """Time to open an index of random 256-d vectors with and without verifying its checksums."""
    columns: dict[str, list[Any]] = {name: [None] * rows for name in SCHEMA.names}
    names = [f"/home/somebody/Pictures/2024/{number:09d}.jpg" for number in range(rows)]
    columns |= {"id": names, "path": names, "hash": [f"{n:032x}" for n in range(rows)], "captions": [["a dog"]] * rows}
    entries = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)
    rng, folder = np.random.default_rng(0), scratch / f"{rows}.index"
    blocks = (rng.standard_normal((min(BLOCK, rows - start), 256), np.float32) for start in range(0, rows, BLOCK))
    write_index(folder, Manifest("model", "0", 256, neighbours="exact"), entries, blocks)
    seconds = {}
    for verify in (False, True):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            ImageIndex.open(folder, verify)
            times.append(time.perf_counter() - start)
        seconds["verified" if verify else "opened"] = min(times)
    return {"images": rows, "bytes": sum(path.stat().st_size for path in folder.iterdir()), **seconds}


# --- the table ------------------------------------------------------------------------------------------------------

HEAD = """# Under load

Written by `benchmarks/load.py`: {cores} cores, shared by the page and its simulated users.

## The page of `miniclip app`

"""
PAGE_TAIL = """
Every fifth search uploads a picture, the others are captions, drawn from {captions:,} ones. Each answer was compared
with that of the index itself. "Answer" is the time until the names of the images found arrive, "page" until their
pictures do. Users look at a page for an exponentially distributed time with this mean. Memory is that of the server
when it starts to listen, after a sixth and after half of the time, and at the end. The towers are loaded and warmed up
before the server listens.
"""
IMAGES_HEAD = """
## Many images

The images are copies of those in the folder.

| command | images | memory after a tenth, MiB | at the end, MiB |
|---|---|---|---|
"""
BYTES_HEAD = """
## Checksums of an index

Seconds of `ImageIndex.open` with the files in memory. Up to {limit} MB, checksums are compared by default.

| images, 256 dimensions | MB | without checksums | with |
|---|---|---|---|
"""


def page_table(lines: list[dict[str, Any]]) -> str:
    """Markdown table of the page's measurements."""
    out = (
        "| images | users | mean look, s | searches per second | searches | pictures | errors | answer p50, s "
        "| p99, s | page p50, s | p99, s | memory, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for line in lines:
        times = " | ".join(f"{value:.2f}" for name in ("answer", "page") for value in line[name] or [float("nan")] * 2)
        memory = " / ".join(f"{value:.0f}" for value in line["memory"])
        out += (
            f"| {line['images']:,} | {line['users']} | {line['think']:g} | {line['searches'] / line['seconds']:.1f} "
            f"| {line['searches']:,} | {line['files']:,} | {line['errors']} | {times} | {memory} |\n"
        )
    return out


def document(lines: list[dict[str, Any]]) -> str:
    """Contents of `load.md`."""
    of = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    text = (
        HEAD.format(cores=lines[0]["cores"])
        + page_table(of["page"])
        + PAGE_TAIL.format(captions=of["page"][-1]["captions"])
        + IMAGES_HEAD
    )
    for part, name in (("encode", "`encode_images`"), ("index", "`miniclip index`, peaks of two runs")):
        for line in of[part]:
            text += f"| {name} | {line['images']:,} | {line['memory'][0]:.0f} | {line['memory'][1]:.0f} |\n"
    text += BYTES_HEAD.format(limit=VERIFIED >> 20)
    for line in of["checksums"]:
        text += (
            f"| {line['images']:,} | {line['bytes'] / 2**20:.0f} | {line['opened']:.3f} | {line['verified']:.3f} |\n"
        )
    return text


PARTS = ("page", "encode", "index", "checksums")


def environment() -> dict[str, str]:
    """Environment of the processes that this script starts."""
    return {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}


def trained(folder: Path) -> str:
    """Train the built-in recipe for a few steps. Returns the export."""
    argv = ["--recipe", "scenes", "--max_steps", "50", "--output_dir", str(folder)]
    run([sys.executable, str(TRAINING), *argv])
    return str(folder / "export")


def run(argv: list[str]) -> float:
    """Run a command to its end. Returns its peak memory in MiB."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=environment())
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{output.read()[-2000:]}\n{argv}: exit code {process.returncode}")
    return used.ru_maxrss / 1024


def measure(part: str, export: str, args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Measure one part. Returns its lines of `load.jsonl`."""
    if part == "page":
        index = Path(args.index or scratch / "index")
        run(miniclip("index", export, args.dataset, "-o", index))
        return [measure_page(index, args)]
    if part == "checksums":
        return [measure_checksums(scratch, rows) for rows in args.rows]
    files = many_files(Path(args.dataset), args.images, scratch / part)
    if part == "encode":
        return [measure_encoding(export, files)]
    return [measure_indexing(export, files, scratch)]


def main() -> None:
    """Measure the chosen parts and write `load.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder of images with captions")
    parser.add_argument("--export", help="model to use")
    parser.add_argument("--index", help="index of the images, made or updated with the model")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=5.0, help="mean seconds between two searches of a user")
    parser.add_argument("--images", type=int, default=20_000, help="number of images to encode")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[200_000, 1_000_000], help="sizes of the indexes to open"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    recorded = [json.loads(line) for line in FIGURES.read_text().splitlines()] if FIGURES.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        export = args.export or trained(scratch / "run")
        for part in args.only:
            found = [{"part": part, "cores": os.cpu_count(), **line} for line in measure(part, export, args, scratch)]
            print(*found, sep="\n", flush=True)
            recorded = [line for line in recorded if line["part"] != part] + found
            FIGURES.write_text("".join(json.dumps(line) + "\n" for line in recorded), encoding="utf-8")
            FIGURES.with_suffix(".md").write_text(document(recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
