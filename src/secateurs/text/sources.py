"""Text and conversations from files, folders and data sets by name."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from secateurs.text.conversations import FIELDS, Conversation, conversation_of
from secateurs.text.documents import Files, Reader, Text, is_blank
from secateurs.text.files import FORMATS, Row, format_of
from secateurs.text.folders import Split, files_of
from secateurs.text.formats import read_rows
from secateurs.text.hub import PUBLISHED, from_hub, from_published, hub_name

# Of a data set on the hub, which may hold terabytes, no more than this is read: some eight million tokens.
HUB_CHARACTERS = 32_000_000
# Files that hold no more are read into memory, and calibration tokenises them whole.
WHOLE = 4_000_000
# Rows that are looked at to see what they are.
FIRST = 100


def load_text(
    source: str | Path,
    *,
    field: str = "text",
    split: Split = "calibration",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Text:
    """Read text, or conversations as the model's chat template writes them.

    Args:
        source: a file of text (`.txt`, `.md`: one document, as it is) or of rows (`.jsonl`, `.json`, `.csv`,
            `.tsv`, `.parquet`, `.arrow`: a document a row), any of them packed (`.gz`), a folder of these
            (see `files_of`), `wikitext2`, `ptb`, `c4`, or a data set on the Hugging Face hub, `name` or
            `name:config`. A folder that is called like a data set is `./name`.
        field: where the rows of a file or of a data set on the hub keep their text; the three named data
            sets know theirs. Rows that have no such field but are conversations (see `conversation_of`), or
            keep their messages in it, are rendered.
        split: what the text is for. A data set, on the hub or in a folder, has its train split read for
            calibration, its test split (C4, and those without one: validation) for evaluation; other files
            are read whole for either. Of a data set on the hub that is not one of the three, the first 32
            million characters are read.
        tokenizer: writes conversations.

    Returns:
        The documents with what joins them: a blank line, but for the three named data sets; nothing between
        conversations. Files of more than four million characters are not read into memory. Rows whose field
        is null or missing are left out, with a warning that counts them.

    Raises:
        ValueError: there is no such file or data set, it cannot be read or decoded or reached, no row has
            the field, a row has no text in it, a conversation is refused, or there is no text. Names the file
            and the line or row.
    """
    path, name = Path(source), str(source)
    if name in PUBLISHED and not isinstance(source, Path):
        text = from_published(name, PUBLISHED[name][split])
    elif path.exists():
        text = _from_files(find_files(path, split), field, tokenizer)
    else:
        rows = from_hub(hub_name(source), split)
        first = list(islice(rows, FIRST))
        reader = Reader(first, field, tokenizer)
        text = reader.text(_first_characters(chain(first, rows), reader, name))
        reader.finish()
    if not isinstance(text.documents, Files) and all(map(is_blank, text.documents)):
        raise ValueError(f"'{source}' holds no text")
    return text


def load_conversations(source: str | Path, *, split: Split = "calibration") -> list[Conversation]:
    """Read conversations, in each of which an assistant answers, to train on.

    Args:
        source: a file of rows, a folder, or a data set on the hub, as `load_text` takes them; a file with a
            suffix of its own is read as `.jsonl`. See `conversation_of` for the forms of a row.
        split: see `load_text`.

    Raises:
        ValueError: the source cannot be read, or a row is not a conversation; names the file and the line.
    """
    path = Path(source)
    rows: Iterator[Row]
    if path.exists():
        files = files_of(path, split) if path.is_dir() else [path]
        rows = chain.from_iterable(read_rows(file, FIELDS) for file in files)
    else:
        rows = from_hub(hub_name(source), split)
    found, nulls = [], 0
    for row in rows:
        conversation = conversation_of(row)
        if conversation is None:
            nulls += 1
        elif not conversation.answers:
            raise ValueError(f"{row.where}: no message of the role 'assistant' that answers another")
        else:
            found.append(conversation)
    if not found:
        raise ValueError(f"'{source}' holds no conversations")
    if nulls:
        warnings.warn(f"'{source}': {nulls} rows without a conversation are left out", stacklevel=2)
    return found


def find_files(path: Path, split: Split) -> list[Path]:
    """The file, or those of the folder that `files_of` chooses.

    Raises:
        ValueError: it is of no format that can be read.
    """
    if path.is_dir():
        return files_of(path, split)
    if format_of(path) is None:
        raise ValueError(f"'{path}' is not one of {FORMATS}")
    return [path]


def _from_files(paths: list[Path], field: str, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    with_rows = [path for path in paths if format_of(path) != ".txt"]
    rows = chain.from_iterable(read_rows(path, (field, *FIELDS)) for path in with_rows)
    reader = Reader(list(islice(rows, FIRST)), field, tokenizer)
    files = Files(tuple(paths), reader)
    documents: list[str] = []
    started: list[str] = []
    characters = 0
    for text, ends in files.parts():
        started.append(text)
        characters += len(text)
        if characters > WHOLE:
            return reader.text(files)
        if ends:
            documents.append("".join(started))
            started.clear()
    return reader.text(documents)


def _first_characters(rows: Iterable[Row], reader: Reader, source: str) -> list[str]:
    documents, characters = [], 0
    for number, row in enumerate(rows, start=1):
        text = reader(row)
        if text is None:
            continue
        documents.append(text)
        characters += len(text)
        if characters >= HUB_CHARACTERS:
            warnings.warn(f"'{source}': only its first {number} rows are read", stacklevel=3)
            break
    return documents
