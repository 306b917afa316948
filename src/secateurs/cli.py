"""The command line: one typed command per verb. It parses, calls and prints; the work is done elsewhere.

A user's mistake is one line on standard error and exit status 2. An interrupted run exits with 130.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Model = Annotated[str, tyro.conf.Positional]


def prune(
    model: Model,
    *,
    output: Path,
    calibration: str | None = None,
    method: str = "sparsellm",
    pattern: str = "50%",
    allocation: str = "uniform",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    field: str = "text",
    device: str | None = None,
    target: Literal["layer", "block", "dense"] | None = None,
    sequential: Literal["block", "sublayer", "linear"] | None = None,
    batch_size: int | None = None,
) -> None:
    """Prune a pretrained model into a new folder that transformers loads.

    The model is read and written one block at a time, so it may be larger than memory. Interrupt it
    whenever you like: the same command continues where it stopped.

    Example: secateurs prune my-llama --calibration text.txt --pattern 70% --output my-llama-70

    Args:
        model: A Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        output: The folder to make. It must not exist, unless this same command began it.
        calibration: Text like that which the model will see: a .txt, .jsonl or .parquet file, a folder of
            these, a dataset on the hub, or wikitext2, ptb, c4. Only magnitude does without.
        method: sparsellm, or a local method by itself: magnitude, wanda, sparsegpt or admm. With settings:
            sparsellm:solver=sparsegpt,iterations=2 or sparsegpt:block=64,damping=0.02.
        pattern: 70% (zeros anywhere) or 2:4 (keep two of every four inputs; any n:m).
        allocation: How the pattern's zeros are shared out between layers: uniform; sensitivity (most where
            that moves a block's output least); owl (fewer where there are outliers; with settings:
            owl:level=layer,m=5,lambda=0.08). Or, whatever the pattern, a .json file that maps layer names
            with wildcards to patterns, such as {"*.mlp.*": "70%"}.
        samples: Calibration sequences.
        length: Tokens in each. By default as many as the model was made for, at most 2048.
        seed: Of the calibration sample.
        field: Of jsonl, parquet or dataset rows: the one that holds the text.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
        target: What is aimed at: each layer's own dense output (layer), the dense block's (block) or the
            dense model's (dense), for which o and down make up for what was lost before them. By default
            dense for sparsellm and layer, as published, for the others.
        sequential: What a layer's inputs have seen when they are measured: the pruned blocks before it
            (block, as local methods were published), also its own block's pruned attention (sublayer), or
            every pruned layer (linear). Sparsellm and targets beyond the layer always see every layer.
        batch_size: Sequences run at once. By default 2048 tokens' worth.
    """
    from secateurs.pruning.walk import prune as run

    report = run(
        model,
        output=output,
        calibration=calibration,
        method=method,
        pattern=pattern,
        allocation=allocation,
        samples=samples,
        length=length,
        seed=seed,
        field=field,
        device=device,
        target=target,
        sequential=sequential,
        batch_size=batch_size,
        progress=True,
    )
    print(
        f"{report.output}: {report.sparsity:.2%} zeros in {len(report.layers)} layers, "
        f"mean relative error {report.error:.4f}, {report.seconds:.1f} s"
    )


def evaluate(
    model: Model,
    *,
    text: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    length: int | None = None,
    field: str = "text",
    device: str | None = None,
    batch_size: int | None = None,
    task_data: Path | None = None,
    limit: int | None = None,
) -> None:
    """Measure a model, dense or pruned: perplexity on texts, accuracy on lm-eval's tasks.

    Perplexity is that of the SparseGPT line of papers: the joined text in windows that do not overlap.

    Example: secateurs eval my-llama-70 --text wikitext2 novel.txt --tasks piqa

    Args:
        model: A Hugging Face model folder, or a name on the hub.
        text: Texts: .txt, .jsonl or .parquet files, folders of these, datasets on the hub, or wikitext2,
            ptb, c4.
        tasks: Names of lm-eval's tasks.
        length: Tokens in a window. By default as many as the model was made for, at most 2048.
        field: Of jsonl, parquet or dataset rows: the one that holds the text.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
        batch_size: Windows run at once. By default 4096 tokens' worth.
        task_data: A folder with the tasks' data, where the hub is out of reach.
        limit: Documents per task. By default all.
    """
    from secateurs.evaluation import evaluate as run

    for row in run(
        model,
        text=text,
        tasks=tasks,
        length=length,
        field=field,
        device=device,
        batch_size=batch_size,
        task_data=task_data,
        limit=limit,
    ):
        print(row, flush=True)


def inspect(model: Model, *, against: str | None = None, output: Path | None = None) -> None:
    """Show where a model's weights went: zeros, structure and what was kept, layer by layer.

    Any model folder will do, whoever pruned it.

    Example: secateurs inspect my-llama-70 --against my-llama --output pictures

    Args:
        model: A Hugging Face model folder, compressed or not, or a name on the hub. It is only read.
        against: The dense model that it was made from: what was kept of its largest weights, and how the
            distribution changed.
        output: A folder for pictures, PNG and SVG. Without it there is only the table.
    """
    from secateurs.evaluation.inspect import inspect as run
    from secateurs.evaluation.inspect import print_tables

    print_tables(run(model, against=against, output=output))


def plot(folder: Annotated[Path, tyro.conf.Positional], *, output: Path | None = None) -> None:
    """Draw what the record of a pruned model holds: error and sparsity per layer, convergence per block.

    Args:
        folder: A folder that `secateurs prune` made.
        output: A folder for the pictures, PNG and SVG. By default `plots` inside the model's.
    """
    from secateurs.evaluation.plot import plot as run

    for file in run(folder, output):
        print(file)


def demo(*, pattern: str = "70%", device: str | None = "cpu") -> None:
    """Prune the bundled model with every method, and compare. No network, under three minutes.

    Args:
        pattern: 70%, 2:4...
        device: cpu, cuda, cuda:1.
    """
    from secateurs.demo import demo as run

    run(pattern=pattern, device=device)


def compress(model: Model, *, output: Path) -> None:
    """Write a pruned model so that its zeros take no space: smaller, and faster to run.

    `import secateurs` is all that transformers needs to load the folder.

    Example: secateurs compress my-llama-70 --output my-llama-70-small

    Args:
        model: A Hugging Face model folder, pruned, or a name on the hub. It is only read.
        output: The folder to make. It must not exist.
    """
    from secateurs.runtime import compress as run

    done = run(model, output)
    print(
        f"{output}: {done.layers} layers compressed, {done.dense_layers} left dense; "
        f"{done.bytes_before / 1e6:.1f} MB became {done.bytes_after / 1e6:.1f} MB"
    )


def decompress(model: Model, *, output: Path) -> None:
    """Turn a compressed model into an ordinary dense one.

    Args:
        model: A compressed model folder, or a name on the hub. It is only read.
        output: The folder to make. It must not exist.
    """
    from secateurs.runtime import decompress as run

    run(model, output)
    print(output)


def generate(
    model: Model, *, prompt: str, tokens: int = 100, device: str | None = None, stats: bool = False
) -> None:
    """Continue a prompt with a model, dense or compressed, one likeliest token after another.

    Example: secateurs generate my-llama-70-small --prompt "It was a dark night" --stats

    Args:
        model: A Hugging Face model folder, or a name on the hub.
        prompt: What to continue.
        tokens: At most so many new ones.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
        stats: Also print tokens per second and memory, on standard error.
    """
    from secateurs.runtime.generate import Pace
    from secateurs.runtime.generate import generate as run

    pace = Pace()
    pieces = run(model, prompt, tokens=tokens, device=device, pace=pace)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if stats:
        print(pace, file=sys.stderr)


def bench(
    model: Model, *, against: str | None = None, text: str | None = None, device: str | None = None
) -> None:
    """Measure what a model costs to run: bytes, memory, tokens per second, perplexity.

    Example: secateurs bench my-llama-70-small --against my-llama --text wikitext2

    Args:
        model: A Hugging Face model folder, dense or compressed, or a name on the hub.
        against: Another one, to compare with.
        text: To measure perplexity on: a file, a folder, or a name as `eval` takes it.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
    """
    from secateurs.evaluation.speed import bench as run
    from secateurs.evaluation.speed import table

    print(table(run(model, against=against, text=text, device=device)))


def serve(model: Model, *, host: str = "localhost", port: int = 8000, device: str | None = None) -> None:
    """Serve a model, dense or compressed, with transformers' OpenAI-compatible server.

    Args:
        model: A Hugging Face model folder, or a name on the hub.
        host: Address to listen on.
        port: To listen on.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
    """
    from secateurs.runtime.serve import serve as run

    run(model, host=host, port=port, device=device)


def main() -> None:
    """Entry point of the `secateurs` command."""
    commands: dict[str, Callable[..., Any]] = {
        "prune": prune,
        "eval": evaluate,
        "inspect": inspect,
        "plot": plot,
        "compress": compress,
        "decompress": decompress,
        "generate": generate,
        "bench": bench,
        "serve": serve,
        "demo": demo,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="secateurs",
            description="Prune, train and run sparse large language models. Start with: secateurs demo",
        )
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"secateurs: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
