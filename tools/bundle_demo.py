"""Put a trained model and excerpts of its books where the package carries them.

    python tools/bundle_demo.py --model models/llama --books DIR

The excerpts are 25 kB from the middle of eight novels that the model was trained on, to calibrate on, and
120 kB of one that it never saw, to measure on.
"""

import shutil
from pathlib import Path

import tyro
from train_model import HELD_OUT

DEMO = Path(__file__).parent.parent / "src/secateurs/demo"
CARRIED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def excerpt(book: Path, characters: int) -> str:
    """Whole paragraphs from the middle of a book."""
    text = book.read_text(encoding="utf-8")
    start = text.index("\n", len(text) // 3) + 1
    return text[start : text.index("\n", start + characters) + 1]


def main(model: Path, books: Path, demo: Path = DEMO) -> None:
    (demo / "model").mkdir(parents=True, exist_ok=True)
    for name in (*CARRIED, "training.json"):
        shutil.copyfile(model / name, demo / "model" / name)
    trained_on = [book for book in sorted(books.glob("*.txt")) if book.name not in HELD_OUT][::2]
    (demo / "calibration.txt").write_text("".join(excerpt(book, 25_000) for book in trained_on), encoding="utf-8")
    (demo / "held_out.txt").write_text(excerpt(books / HELD_OUT[0], 120_000), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
