"""The command line: one typed command per verb. It parses, calls and prints; the work is done elsewhere.

A user's mistake is one line on standard error and exit status 2. An interrupted run exits with 130.
"""

import sys
import warnings
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
    repair: float | None = None,
    refine: int | None = None,
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
        repair: The share of what earlier blocks lost that the target dense asks o and down to make up for. By
            default 0.5.
        refine: Passes over the calibration text in which the weights that are left in a pruned block are
            trained towards the target. By default 8 for sparsellm, 0 for the others and for the target layer.
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
        repair=repair,
        refine=refine,
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


def profile(
    model: Model,
    *,
    text: str,
    output: Path | None = None,
    samples: int = 32,
    length: int | None = None,
    field: str = "text",
    device: str | None = None,
) -> None:
    """Measure how many heads and channels of a model are barely active: what sparse training may skip.

    Example: secateurs profile my-llama --text wikitext2 --output activity

    Args:
        model: A Hugging Face model folder, or a name on the hub.
        text: A file, a folder, or a name as `eval` takes it.
        output: A folder to make, for the figures and a picture (PNG and SVG).
        samples: Windows of the text to read: the first ones.
        length: Tokens in a window. By default as many as the model was made for, at most 2048.
        field: Of jsonl, parquet or dataset rows: the one that holds the text.
        device: cpu, cuda, cuda:1. By default a GPU if there is one.
    """
    from rich.console import Console

    from secateurs.training.profile import profile as run
    from secateurs.training.profile import table

    blocks = run(model, text=text, output=output, samples=samples, length=length, field=field, device=device)
    Console().print(table(blocks))


def train(
    model: Model,
    *,
    output: Path,
    text: str | None = None,
    chat: Path | None = None,
    validation: str | None = None,
    field: str = "text",
    omission: float = 0.5,
    importance: Literal["uniform", "magnitude", "activation", "weighted", "taylor"] = "weighted",
    select: Literal["topk", "sample"] = "topk",
    schedule: Literal["ladder", "constant", "linear", "cubic"] = "ladder",
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    learning_rate: float | None = None,
    warmup: float | None = None,
    length: int | None = None,
    lora: int | None = None,
    seed: int | None = None,
    settings: Path | None = None,
    report_to: tuple[str, ...] = (),
    device: str | None = None,
) -> None:
    """Train a pretrained model on text or conversations, skipping what matters least at the moment.

    Steps run on a part of the heads and channels, and at the end of training on all of them. A pruned model
    keeps its zeros. Interrupt it whenever you like: the same command continues from the last checkpoint.

    Example: secateurs train my-llama --text papers/ --validation held-out.txt --output my-llama-papers

    Example: secateurs train my-llama --chat questions.jsonl --epochs 2 --output my-llama-chat

    Args:
        model: A Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        output: The folder to make. It must not exist, unless this same command began it.
        text: What to pre-train on: a .txt, .jsonl or .parquet file, a folder of these, a dataset's name.
        chat: What to fine-tune on instead: a .jsonl file whose lines have messages, or question and answer,
            or prompt and completion. The loss is that of the answers only.
        validation: The same kind of data, for the loss on text that was not trained on.
        field: Of jsonl, parquet or dataset rows of text: the one that holds it.
        omission: Highest share of heads and channels that a step skips, in [0, 1). 0 is plain training.
        importance: What decides which.
        select: The most important ones, or a sample in proportion to importance.
        schedule: How the share goes from the highest to 0; constant never does.
        epochs: Passes over the data. By default one.
        steps: Optimiser steps, instead of epochs.
        batch_size: Sequences on each device at once. By default 8.
        accumulation: Batches to an optimiser step. By default 1.
        learning_rate: Its peak. By default 5e-5, with LoRA 2e-4.
        warmup: Steps until then, or below 1 their share of all steps. By default 0.03.
        length: Tokens in a block of text, or at most in a conversation. By default as many as the model was
            made for, at most 2048.
        lora: Train adapters of this rank, which are merged into the weights at the end.
        seed: Of the order of the data and of all else that is random. By default 0.
        settings: A YAML file with any of Trainer's settings; the options here come before it.
        report_to: Loggers that Trainer knows: tensorboard, wandb, mlflow...
        device: cpu or cuda. By default a GPU if there is one.
    """
    from secateurs.training.run import train as run

    report = run(
        model,
        output=output,
        text=text,
        chat=chat,
        validation=validation,
        field=field,
        omission=omission,
        importance=importance,
        select=select,
        schedule=schedule,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        warmup=warmup,
        length=length,
        lora=lora,
        seed=seed,
        settings=settings,
        report_to=report_to,
        device=device,
        progress=True,
    )
    print(report)


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
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    commands: dict[str, Callable[..., Any]] = {
        "prune": prune,
        "profile": profile,
        "train": train,
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
