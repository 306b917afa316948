"""Train what is left of a pruned model towards the dense model's predictions: what `secateurs recover` runs.

Everything is Trainer's, with another loss and a callback that holds the zeros and the levels. As with
`secateurs train` the output is the input's folder with other weights, which appears when it is complete;
until then the same command resumes from the last checkpoint.
"""

import math
import os
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from secateurs.calibration.sequences import CalibrationText, calibration_text, sha256_of
from secateurs.checkpoint import (
    RECORD,
    Checkpoint,
    check_place,
    copy_companions,
    output_lock,
    read_json,
    resolve,
)
from secateurs.checkpoint.companions import bytes_of_companions
from secateurs.checkpoint.config import read_config as read_causal_config
from secateurs.checkpoint.config import refuse_quantised
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.scales import read_scales, write_scales
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.device import multiplies_bfloat16, resolve_device
from secateurs.recovery.levels import Levels, homes_of
from secateurs.recovery.report import KEY, RecoveryReport
from secateurs.recovery.settings import RecoverSettings
from secateurs.recovery.steps import (
    STATES,
    Recovery,
    blocks_alike,
    held_out_loss,
    hold_out,
    in_order,
    rows_of,
    without_noise,
)
from secateurs.runtime.load import load_model
from secateurs.settings import takes
from secateurs.text import TooShortError, check_tokens, load_tokenizer
from secateurs.training.arguments import is_sharded, read_settings, state_restored, trainer_arguments
from secateurs.training.folder import STATELESS, TrainingFolder, bytes_at_once
from secateurs.training.loop import (
    for_training,
    history,
    make_steps,
    peak_memory_bytes,
    silent,
    with_adapters,
)
from secateurs.training.masks import Keep, Masks
from secateurs.training.model import read_config, sequence_length
from secateurs.training.watch import Watch
from secateurs.training.weights import StoredWeights
from secateurs.version import __version__

HELD_OUT = 8192
"""Tokens that are held out to judge by, where an eighth of the sequences is not fewer."""


@takes(RecoverSettings)
def recover(model: str | Path, *, settings: RecoverSettings, progress: bool = False) -> RecoveryReport:
    """Train what is left of a pruned model towards the dense model's predictions, into a new folder.

    Weights are trained in float32 (with LoRA: the adapters), with products in bfloat16 where the device is
    fast at them. Zeros stay where they are, and of what was rounded the scales are trained. The output is
    the model's folder with other weights, each tensor in the dtype it came in. If they do no better on text
    that was held out, the weights in it are the model's own. If the run is interrupted, the same call
    continues it.

    Args:
        model: a pruned model's folder with safetensors, or a name on the hub. It is only read.
        progress: show a progress bar on standard error.

    Returns:
        The record of the run, as it stands in `secateurs.json`.

    Raises:
        ValueError: a mistake in the arguments, the model folders or the text; found before a model is loaded
            where that is possible.
        FloatingPointError: the loss is not finite any more; the last checkpoint stays.
        OSError: the disk is too small or fails. What is done stays, and the same call continues.
    """
    checkpoint = Checkpoint(resolve(model))
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of one run
    if first:
        check_place(Path(settings.output), checkpoint)
    with output_lock(Path(settings.output)) if first else nullcontext():
        return recover_folder(checkpoint, settings, model=str(model), progress=progress)


@state_restored()
def recover_folder(
    checkpoint: Checkpoint, settings: RecoverSettings, *, model: str, progress: bool, run: str | None = None
) -> RecoveryReport:
    """What `recover` does once it has the output to itself.

    Args:
        checkpoint: the pruned model.
        model: how its user calls it.
        run: what stands for all that decides the result, where this is the end of a run of `prune`.
    """
    dense = Checkpoint(resolve(settings.towards))
    grids = read_scales(checkpoint.folder)
    if grids and settings.lora:
        raise ValueError(
            f"'{checkpoint.folder}' was rounded, and adapters would move its weights off their grids: leave "
            "lora out, so that its scales are trained"
        )
    text = recovery_text(settings, checkpoint, dense, progress)
    homes = homes_of(skeleton_of(checkpoint), grids)
    length = text.length
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = _trainer(settings, length, processes)
    chosen = {
        "model": model,
        "towards": str(settings.towards),
        "calibration": text.record,
        "text_loss": settings.text_loss,
        "states": STATES,
        "lora": settings.lora,
        "max_shard_size": size_in_bytes(settings.max_shard_size),
        "processes": processes,
        "trainer": {name: value for name, value in trainer.items() if name != "report_to"},
    }
    used = ["torch", "transformers", "accelerate", *(["peft"] if settings.lora else [])]
    versions = {"secateurs": __version__, **{name: version(name) for name in used}}
    identity = {
        # Not how the models were spelled, but what they are.
        "settings": {name: value for name, value in chosen.items() if name not in ("model", "towards")},
        "tokens": settings.tokens,
        "versions": versions,
        "model": checkpoint.identity(),
        "dense": dense.identity(),
    }
    work = TrainingFolder(Path(settings.output), identity, run)
    arguments = _arguments(trainer, work)
    if work.finished():
        if arguments.should_save:
            work.clear()
        return RecoveryReport.read(work.output)
    count = _rows(settings, length, arguments)
    _check_room(settings, checkpoint, dense, arguments, count, work)

    with arguments.main_process_first(local=False):
        if arguments.should_save:
            work.begin()
            work.text.mkdir(exist_ok=True)
        tokens = text.tokens(work.text, progress=progress)
    trained, held = _split(tokens, text, settings.seed)
    rows = in_order(trained, count, settings.seed)
    with silent():
        loaded = load_model(checkpoint.folder, "cpu", None if settings.lora else torch.float32)
        towards = _load_dense(dense, arguments.device)
    weights = StoredWeights(loaded, checkpoint)
    without_noise(loaded)
    set_seed(arguments.seed)
    adapted: Any = with_adapters(loaded, settings.lora) if settings.lora else loaded
    masks = Masks.of_zeros(adapted)
    levels = Levels(loaded, grids, homes)
    if arguments.should_save and not (masks.count or levels.count):
        warnings.warn(f"'{checkpoint.folder}' has no zeros: all its weights are trained", stacklevel=2)
    watch = Watch(None, keep=arguments.save_total_limit, shown=progress)
    arguments.save_total_limit = None
    with silent(), for_training(loaded):
        steps = Recovery(
            dense=towards,
            text=settings.text_loss,
            blocks=blocks_alike(loaded, towards),
            model=adapted,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows_of(held),
            data_collator=default_data_collator,
            callbacks=[Keep(masks, levels), watch],
        )
        steps.remove_callback(PrinterCallback)
        before = held_out_loss(towards, loaded, held, arguments, settings.text_loss)
        if not math.isfinite(before):
            raise FloatingPointError("the divergence from the dense model is not finite on the held-out text")
        last = work.last_checkpoint()
        if last is not None:
            watch.resume(last)
        try:
            with work.saving():
                make_steps(steps, last)
        finally:
            watch.close()
        if settings.lora:
            masks.merge_lora(adapted)
        settled = levels.settle()
        weights.round()
        after = held_out_loss(towards, loaded, held, arguments, settings.text_loss)
    if arguments.should_save:
        kept = not after < before
        if kept:
            weights.restore()
        work.model.mkdir()
        copy_companions(checkpoint.folder, work.model, replaced={"README.md"})
        if scales := grids if kept else settled:
            write_scales(work.model, scales)
        weights.write(work.model, most=size_in_bytes(settings.max_shard_size))
        recovery = {
            "settings": {
                **chosen,
                "calibration": {**text.record, "held_out": len(held), "sha256": sha256_of(tokens)},
            },
            "versions": versions,
            "seconds": round(watch.seconds, 3),
            "steps": steps.state.global_step,
            "tokens": count * length,
            "peak_memory_bytes": peak_memory_bytes(arguments.device),
            "zeros": masks.count,
            "rounded": levels.count,
            "before": before,
            "after": after,
            "history": history(steps.state),
        }
        work.finish({**_pruning_record(checkpoint), KEY: recovery}, checkpoint, RecoveryReport)
    steps.accelerator.wait_for_everyone()
    return RecoveryReport.read(work.output)


def check_recovery(settings: RecoverSettings, dense: Checkpoint) -> None:
    """Find, before a model is pruned, what would stop its recovery.

    Raises:
        ValueError: the settings, the text or the model are not fit for it, or memory is too small.
        OSError: the disk is.
    """
    text = recovery_text(settings, dense, dense, False)
    work = TrainingFolder(Path(settings.output), {})
    arguments = _arguments(_trainer(settings, text.length, 1), work)
    _check_room(settings, dense, dense, arguments, _rows(settings, text.length, arguments), work)


def _trainer(settings: RecoverSettings, length: int, processes: int) -> dict[str, Any]:
    """Trainer's settings: what is given here before what the file says, and that before the defaults."""
    told = {} if settings.settings is None else read_settings(Path(settings.settings), TrainingArguments)
    for name in ("num_train_epochs", "max_steps"):
        if name in told:
            raise ValueError(f"'{settings.settings}': '{name}' is not for this file to say, but for --tokens")
    defaults = settings.defaults(length, processes, at_once=told.pop("per_device_train_batch_size", None))
    chosen = {**defaults, **({"bf16": False} if told.get("fp16") else {}), **told, **settings.trainer}
    sequences = chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] * processes
    if "learning_rate" not in {**told, **settings.trainer}:
        chosen["learning_rate"] = settings.rate(sequences * length)
    return {
        **chosen,
        "include_num_input_tokens_seen": "all",
        "label_names": ["labels"],
        "train_sampling_strategy": "sequential",
    }


def _arguments(trainer: dict[str, Any], work: TrainingFolder) -> TrainingArguments:
    with silent():
        arguments = trainer_arguments(TrainingArguments, {**trainer, "output_dir": str(work.checkpoints)})
    if is_sharded():
        raise ValueError(
            "recovery holds parameters whole, and shares the text out: leave out fsdp and deepspeed"
        )
    if arguments.n_gpu > 1:
        raise ValueError("several GPUs, one process: start recovery with torchrun, or choose one GPU")
    return arguments


def _rows(settings: RecoverSettings, length: int, arguments: TrainingArguments) -> int:
    """Sequences of all steps."""
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return max(1, round(settings.tokens / length / batch)) * batch


def _check_room(
    settings: RecoverSettings,
    checkpoint: Checkpoint,
    dense: Checkpoint,
    arguments: TrainingArguments,
    rows: int,
    work: TrainingFolder,
) -> None:
    """See whether disk and memory hold what cannot be done without: on one device, activations left out."""
    checkpoints = bytes_at_once(checkpoint, arguments, rows=rows, lora=settings.lora)
    work.check_room(checkpoints + checkpoint.tensor_bytes + bytes_of_companions(checkpoint.folder))
    needed = checkpoint.tensor_bytes
    if not settings.lora:  # float32 weights, their gradients, and what the optimiser keeps of each
        weights = sum(math.prod(shape) for shape in checkpoint.shapes.values())
        needed = 4 * weights * (2 if arguments.optim in STATELESS else 4)
    needed += dense.tensor_bytes
    device, free = arguments.device, psutil.virtual_memory().available
    where = "there are"
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], f"{device} has"
    if needed > free:
        instead = "use a larger machine" if settings.lora else "use secateurs recover with --lora 16"
        raise ValueError(
            f"recovery needs at least {needed / 1e9:.1f} GB of memory for the two models, {where} "
            f"{free / 1e9:.1f} GB free: {instead}"
        )


def recovery_text(
    settings: RecoverSettings, checkpoint: Checkpoint, dense: Checkpoint, progress: bool
) -> CalibrationText:
    """Sequences to train on and to judge by; what the dense model is to write of them is not written yet.

    Raises:
        ValueError: the text or the models are not fit for it.
    """
    for one in (checkpoint, dense):
        refuse_quantised(one, compressed=True)
    config, dense_config = read_config(checkpoint), read_causal_config(dense)
    for one in (checkpoint, dense):
        skeleton_of(one)
    _check_vocabulary(checkpoint, config, dense, dense_config)
    text = _read(settings, dense, config, dense_config, progress)
    sequence_length(text.length, config)
    if text.samples < 2:
        raise ValueError("some of the sequences are held out to judge by: give two or more")
    for part in text.parts:
        if part.read is not None:
            check_tokens(part.read, _vocabulary(config))
    if text.form is None:
        _split(text.tokens(), text, settings.seed)
    return text


def _read(
    settings: RecoverSettings,
    dense: Checkpoint,
    config: PretrainedConfig,
    dense_config: PretrainedConfig,
    progress: bool,
) -> CalibrationText:
    """Of a text that has fewer sequences than they are by default, half as many, and half again."""
    length = settings.length
    if not isinstance(settings.calibration, Tensor):
        length = min(sequence_length(length, one) for one in (config, dense_config))
    samples = settings.sequences(length or 1)
    while True:
        try:
            return calibration_text(
                settings.calibration,
                dense,
                dense_config,
                resolve_device(settings.device),
                samples=samples,
                length=length,
                seed=settings.seed,
                field=settings.field,
                bos=settings.asked_bos,
                progress=progress,
            )
        except TooShortError:
            if settings.samples is not None or samples < 4:
                raise
            samples //= 2


def _split(tokens: Tensor, text: CalibrationText, seed: int) -> tuple[Tensor, Tensor]:
    """(sequences, length) to train on, and others that are held out."""
    count, length = tokens.shape
    return hold_out(tokens, max(1, min(count // 8, -(-HELD_OUT // length))), seed, text.written)


def _vocabulary(config: PretrainedConfig) -> int:
    size: int = config.get_text_config(decoder=True).vocab_size
    return size


def _check_vocabulary(
    checkpoint: Checkpoint, config: PretrainedConfig, dense: Checkpoint, dense_config: PretrainedConfig
) -> None:
    """Raises ValueError if a token of one model is another one of the other, or none."""
    names = []
    for one in (checkpoint, dense):
        try:
            names.append({id: text for text, id in load_tokenizer(one.folder).get_vocab().items()})
        except ValueError:  # token ids may be all that there is
            names.append({})
    own, others = names
    for token in sorted(own.keys() & others.keys()):
        if own[token] != others[token]:
            raise ValueError(
                f"the vocabularies do not agree: token {token} is {own[token]!r} in '{checkpoint.folder}' "
                f"and {others[token]!r} in '{dense.folder}'"
            )
    sizes = _vocabulary(config), _vocabulary(dense_config)
    # Of two sizes the larger one may be padded: with rows that are no token's.
    known = max([*own, *others], default=None)
    if sizes[0] != sizes[1] and (known is None or known >= min(sizes)):
        raise ValueError(
            f"the vocabularies do not agree: '{checkpoint.folder}' has {sizes[0]} tokens, '{dense.folder}' "
            f"{sizes[1]}"
        )


def _load_dense(dense: Checkpoint, device: torch.device) -> PreTrainedModel:
    """In its own dtype, if the device is fast at that."""
    model = load_model(dense.folder, "cpu")
    fast = (torch.bfloat16,) if multiplies_bfloat16(device) else ()
    if device.type == "cuda":
        fast = (*fast, torch.float16)
    if model.dtype not in fast:
        model = model.float()
    model.config.get_text_config(decoder=True).use_cache = False
    model.requires_grad_(False)
    placed: PreTrainedModel = nn.Module.to(model, device)
    return placed


def _pruning_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `prune` said of the model, which stays true: the zeros are the same."""
    file = checkpoint.folder / RECORD
    content = read_json(file) if file.is_file() else {}
    return {name: value for name, value in content.items() if name != "run"} if "layers" in content else {}
