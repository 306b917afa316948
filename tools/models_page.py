"""Write docs/models.md: what each verb does with every text decoder that the installed transformers knows.

    python tools/models_page.py

Nothing in the page is claimed by hand: a tiny random model of each is pruned, measured, compressed, run and
trained (`tests/verbs.py`), and what comes out is held against transformers. It takes some minutes.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.progress import track

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.append(str(ROOT / "tests"))

import decoders  # noqa: E402
from verbs import REFUSED, VERBS, WHOLE, Outcome, Place, outcome_of  # noqa: E402

ESCAPED = r"\*"

HEAD = """# Models

Made by `python tools/models_page.py` with transformers {version}: a tiny random model of every text decoder
that it knows, and of some image-text models around them, has been through every verb. The first column is
what `config.json` calls `model_type`; "+" stands before a variant.

**yes** means that all of the verb works and was held against transformers: the blocks one by one give the
whole model's hidden states to the bit; exactly half of every pruned matrix is zero in the output and all else
is the input's; perplexity and tokens are those of transformers; training steps skip heads and channels. For
prune, the share is that of the blocks' weights which are pruned; what is left dense are routers, convolutions
and the like. Otherwise:

- **local method**: SparseLLM prunes as its local method would, where it does not understand an MLP;
- **in part**: so it does with some; or training skips heads alone, or channels alone, or not in all blocks;
- **80%**: the rest is left as it is;
- **refused**: one line says why, before any work is done; **breaks** and **wrong** are mistakes of ours.
"""

TAIL = """## Not in the table

Of the types that transformers lists as causal language models, {others} are, by its own tables of tasks,
encoders, encoder-decoders, image-text models around a decoder that has a line here, or for sound; and

{reasons}
"""


def attempt(verb: str, place: Place) -> Outcome:
    """What a verb did with a model, whatever happens."""
    try:
        return outcome_of(verb, place)
    except AssertionError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # a page of what works has to say what does not
        return Outcome("breaks", f"{type(error).__name__}: {error}")


def outcomes(name: str) -> dict[str, Outcome]:
    """What each verb did with the tiny model of a type; in what it says the folder has no name."""
    with tempfile.TemporaryDirectory() as folder:
        place = Place(name, Path(folder))
        found = {verb: attempt(verb, place) for verb in VERBS}
        return {
            verb: Outcome(word, " ".join(note.replace(f"{folder}/", "").split()))
            for verb, (word, note) in found.items()
        }


def page(found: dict[str, dict[str, Outcome]]) -> str:
    """The page's text, from what each verb did with each type."""
    notes: list[str] = []

    def cell(outcome: Outcome) -> str:
        word = "yes" if outcome.word == WHOLE else outcome.word
        if outcome.word != WHOLE and outcome.note:
            if outcome.note not in notes:
                notes.append(outcome.note)
            return f"{word}[^{notes.index(outcome.note) + 1}]"
        return f"{word}, {outcome.note}" if outcome.note.endswith("%") else word

    rows = [
        f"| {name} | {' | '.join(cell(outcome) for outcome in row.values())} |" for name, row in found.items()
    ]
    whole = Counter(verb for row in found.values() for verb, outcome in row.items() if outcome.word == WHOLE)
    refused = Counter(
        verb for row in found.values() for verb, outcome in row.items() if outcome.word == REFUSED
    )
    sums = [f"{whole[verb]} yes, {refused[verb]} refused" for verb in VERBS]
    table = [
        f"| model_type | {' | '.join(VERBS)} |",
        "| --- " * (len(VERBS) + 1) + "|",
        *rows,
        f"| **{len(found)} models** | {' | '.join(sums)} |",
    ]
    others = len(transformers.MODEL_FOR_CAUSAL_LM_MAPPING) - len(decoders.text_decoders())
    return "\n".join(
        [
            HEAD.format(version=transformers.__version__),
            *table,
            "",
            *(f"[^{n}]: {note.replace('*', ESCAPED)}" for n, note in enumerate(notes, start=1)),
            "",
            TAIL.format(
                others=others - len(decoders.NO_DECODERS),
                reasons="\n".join(f"- {name}: {reason}" for name, reason in decoders.NO_DECODERS.items()),
            ).rstrip(),
            "",
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page({name: outcomes(name) for name in track(decoders.NAMES)}), encoding="utf-8")
