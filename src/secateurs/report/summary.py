"""What happened, in words: a sentence or two for each folder."""

from collections.abc import Sequence

from secateurs.evaluation.measured import Measured
from secateurs.recovery.report import RecoveryReport
from secateurs.report.charts import percent, plain
from secateurs.report.sources import Source, with_names
from secateurs.training.report import TrainingReport


def summary(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """For each folder its name and what became of the model; a sweep speaks for its cells."""
    return [(source.name, " ".join(_sentences(source, sources))) for source in sources if not source.is_cell]


def _sentences(source: Source, sources: Sequence[Source]) -> list[str]:
    said = []
    report = source.pruning
    if report is not None:
        method = str(report.settings["method"]["name"])
        if report.layers:
            said.append(
                f"{_model(report.settings['model'])}, {report.title} by {method} in {_time(report.seconds)}; "
                f"the mean error of a matrix's output is {percent(report.error)}."
            )
        elif report.title:
            said.append(f"{_model(report.settings['model'])}, {report.title} in {_time(report.seconds)}.")
    trained = source.trained
    if isinstance(trained, RecoveryReport):
        said.append(
            f"Recovered over {trained.tokens:,} tokens: divergence from the dense model on held-out text "
            f"went from {trained.before:.3f} to {trained.after:.3f}."
        )
    elif isinstance(trained, TrainingReport):
        said.append(
            f"Trained for {trained.steps:,} steps, {trained.tokens:,} tokens, in {_time(trained.seconds)}"
        )
        if trained.flops is not None and trained.dense_flops:
            share = percent(trained.flops / trained.dense_flops)
            said[-1] += f", with {share} of the FLOPs of dense training"
        loss = "training" if trained.validation_loss is None else "validation"
        value = trained.train_loss if trained.validation_loss is None else trained.validation_loss
        said[-1] += f"; the {loss} loss is {value:.3f}."
    said += _measured(with_names(source.measured, sources))
    if source.activity is not None:
        said.append(f"Activity of {_model(source.activity['settings']['model'])}, measured.")
    return said


def _measured(rows: list[Measured]) -> list[str]:
    """Of one model its figures; of several how many, and the best by the first figure that all have."""
    good = [row for row in rows if row.figures]
    if len(rows) == 1 and good:
        told = [f"{metric} {plain(value)} on {on}" for on, figures in good[0].figures.items()
                for metric, value in list(figures.items())[:1]]  # fmt: skip
        return [f"{_model(good[0].name)}: {', '.join(told)}."]
    said = []
    pruned = [row for row in good if row.method]
    dense = next((row for row in good if not row.method), None)
    texts = [on for on in (pruned[0].figures if pruned else {}) if "perplexity" in pruned[0].figures[on]]
    if texts:
        best = min(pruned, key=lambda row: row.figures[texts[0]]["perplexity"])
        value = plain(best.figures[texts[0]]["perplexity"])
        said.append(
            f"{len(pruned)} pruned models measured; nearest to the dense one on {texts[0]} is {best.name}, "
            f"perplexity {value}"
        )
        if dense is not None and texts[0] in dense.figures:
            said[-1] += f" (dense {plain(dense.figures[texts[0]]['perplexity'])})"
        said[-1] += "."
    if failed := [row for row in rows if row.error and not row.figures]:
        said.append(f"{len(failed)} could not be: {', '.join(row.name for row in failed)}.")
    return said


def _model(name: object) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
