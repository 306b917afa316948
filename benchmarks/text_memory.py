"""What it takes to draw calibration blocks from texts of any size, and to tokenise a long one.

Texts are made of novels repeated, in a folder that is deleted again. Each row is a process of its own, whose
memory is its own most. With `--against`, the same by another version of the library, turn and turn about.

    python benchmarks/text_memory.py --books BOOKS/*.txt [--against OTHER/src]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, Record, environment, print_table, save
from job import peak_bytes

SRC = Path(__file__).parents[1] / "src"
ROWS: dict[str, tuple[str, int, str, int, int]] = {
    "4 x 64 of 20 MB txt": ("txt", 20, "calibration", 4, 64),
    "4 x 64 of 2 GB txt": ("txt", 2000, "calibration", 4, 64),
    "128 x 2048 of 2 GB txt": ("txt", 2000, "calibration", 128, 2048),
    "128 x 2048 of 2 GB jsonl": ("jsonl", 2000, "calibration", 128, 2048),
    "64 x 512 of 400 MB csv": ("csv", 400, "calibration", 64, 512),
    "20 MB txt in blocks to train on": ("txt", 20, "blocks", 0, 512),
}
"""Format, megabytes, what is done, samples, length."""

COMPARED = ("4 x 64 of 20 MB txt", "20 MB txt in blocks to train on")
"""Rows for the other version too: it would not end on the larger texts."""


def measure(file: str, what: str, samples: int, length: int) -> None:
    """In a fresh process: print what one row takes."""
    import time

    from secateurs.demo import MODEL
    from secateurs.text import calibration_blocks, load_tokenizer
    from secateurs.training.data import packed_blocks

    tokenizer = load_tokenizer(MODEL)
    before, start = peak_bytes(), time.perf_counter()
    if what == "calibration":
        tokens = calibration_blocks(file, tokenizer, samples=samples, length=length)
    else:
        tokens = packed_blocks(file, tokenizer, length=length)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak_bytes": peak_bytes(), "before_bytes": before, "tokens": tokens.numel()}
    print(json.dumps(found))


def lines(books: list[Path]) -> Iterator[str]:
    """Paragraphs of the novels, without end."""
    texts = [[line for line in book.read_text().splitlines() if line] for book in books]
    while True:
        for text in texts:
            yield from text


def make(folder: Path, kind: str, megabytes: int, books: list[Path]) -> Path:
    """A text of a size in a format."""
    file = folder / f"{megabytes}.{kind}"
    if not file.exists():
        size = 0
        with open(file, "w") as out:
            if kind == "csv":
                out.write("text\n")
            for line in lines(books):
                quoted = '"' + line.replace('"', '""') + '"'
                row = {"txt": line, "jsonl": json.dumps({"text": line}), "csv": quoted}[kind] + "\n"
                size += out.write(row)
                if size >= megabytes * 10**6:
                    break
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--books", type=Path, nargs="+", required=True)
    parser.add_argument("--against", type=Path, help="the src of another version")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS / "text_memory.json")
    settings = parser.parse_args()
    rows: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (kind, megabytes, *job) in ROWS.items():
            file = make(Path(scratch), kind, megabytes, settings.books)
            versions = {"this": SRC}
            if settings.against and name in COMPARED:
                versions["other"] = settings.against
            for _ in range(settings.repetitions):
                for version, source in versions.items():
                    command = [sys.executable, __file__, "measure", str(file), *map(str, job)]
                    environ = {**os.environ, "PYTHONPATH": str(source.resolve())}
                    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
                    rows.append({"row": name, "version": version, **json.loads(done.stdout.splitlines()[-1])})
            save(settings.results, environment(), rows)
    table = []
    for name in ROWS:
        for version in ("this", "other"):
            same = [row for row in rows if (row["row"], row["version"]) == (name, version)]
            if same:
                middle = sorted(same, key=lambda row: row["seconds"])[len(same) // 2]
                table.append([name, version, middle["seconds"], middle["peak_bytes"] / 1e6])
    print_table(["what", "version", "seconds", "peak, MB"], table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
