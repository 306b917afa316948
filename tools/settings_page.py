"""Write docs/settings.md: every verb's options, from its settings."""

from pathlib import Path

from secateurs.cli import VERBS
from secateurs.settings import option_table

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

HEAD = """# Settings

Made by `python tools/settings_page.py` from the dataclasses themselves. Each option of a command is a keyword
of the Python function (`--batch-size` is `batch_size`), and a key of the YAML file that `--config` names; the
command line comes before the file. What takes several values may be given in several places: `--text a.txt
--text b.txt` is `--text a.txt b.txt`.

```yaml
# secateurs prune --config run.yaml
model: my-llama
output: my-llama-70
calibration: text.txt
pattern: 70%
allocation: {"*.mlp.*": 75%, "*": 50%}
```
"""


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for name, verb in VERBS.items():
        summary = str(verb.settings.__doc__).partition("\n")[0]
        subject = f" {verb.subject.upper()}" if verb.subject else ""
        parts.append(
            f"## {name}\n\n`secateurs {name}{subject}`: {summary}\n\n{option_table(verb.settings)}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
