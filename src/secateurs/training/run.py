"""Train a pretrained model on text or on conversations, with sparse steps: what `secateurs train` runs.

Everything is Trainer's (for conversations TRL's SFTTrainer) with a callback for sparse steps, one that keeps
a pruned model's zeros, and one that shows the progress. The output is the input's folder with other weights,
which appears when it is complete; until then the same command resumes from the last checkpoint.
"""

import os
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from secateurs.anatomy import anatomy_of
from secateurs.checkpoint import Checkpoint, check_place, copy_companions, output_lock, resolve
from secateurs.checkpoint.companions import bytes_of_companions
from secateurs.checkpoint.config import refuse_quantised, without_deepspeed
from secateurs.checkpoint.names import skeleton_of
from secateurs.checkpoint.shards import size_in_bytes
from secateurs.runtime.load import load_model
from secateurs.settings import takes
from secateurs.text import load_tokenizer
from secateurs.training.adaptive import BEST, ZERO, shares_of
from secateurs.training.arguments import (
    CHAT_DEFAULTS,
    DEFAULTS,
    LORA_DEFAULTS,
    arguments_kind,
    hardware,
    is_by_deepspeed,
    is_sharded,
    read_settings,
    set_aside,
    state_restored,
    trainer_arguments,
)
from secateurs.training.context import context_read_only
from secateurs.training.data import CHAT_TEMPLATE, ChatData, TextData, load_conversations, packed_blocks
from secateurs.training.folder import TrainingFolder, bytes_at_once, steps_in_all
from secateurs.training.head import logits_where_labels
from secateurs.training.loop import (
    for_training,
    history,
    make_steps,
    merge,
    peak_memory_bytes,
    recent_loss,
    silent,
    with_adapters,
)
from secateurs.training.masks import KeepZeros, Masks
from secateurs.training.model import read_config, sequence_length
from secateurs.training.padding import without_padding
from secateurs.training.proof import proven_cuts
from secateurs.training.rates import described
from secateurs.training.report import TrainingReport
from secateurs.training.settings import TrainSettings
from secateurs.training.units import units_kept
from secateurs.training.watch import Watch
from secateurs.training.weights import StoredWeights
from secateurs.version import __version__

PRUNED = 0.01  # share of zeros in a layer from which on they are meant


@takes(TrainSettings)
def train(model: str | Path, *, settings: TrainSettings, progress: bool = False) -> TrainingReport:
    """Train a pretrained decoder into a new folder that transformers loads.

    Continual pre-training on a text, or supervised fine-tuning on the answers in conversations, by
    Sparsity-Accelerated Training (arXiv 2406.01392). Weights are trained in float32 (with LoRA: the
    adapters), with products in bfloat16 where the device is made for them. Zeros of a pruned model stay zero.
    The output is the model's folder with other weights, each tensor in the dtype it came in. If the run is
    interrupted, the same call continues it. With other data to validate on, it measures the finished output.

    Args:
        model: a Hugging Face model folder with safetensors, or a name on the hub. It is only read.
        progress: show a progress bar on standard error.

    Returns:
        The record of the run, as it stands in `secateurs.json`.

    Raises:
        ValueError: a mistake in the arguments, the model folder or the data; found before the model is loaded
            where that is possible.
        FloatingPointError: the loss is not finite any more; the last checkpoint stays.
        OSError: the disk is too small or fails. What is done stays, and the same call continues.
    """
    checkpoint = Checkpoint(resolve(model))
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes of one run
    if first:
        check_place(Path(settings.output), checkpoint)
    with output_lock(Path(settings.output)) if first else nullcontext():
        return _train(str(model), checkpoint, settings, progress)


@state_restored()
def _train(model: str, checkpoint: Checkpoint, settings: TrainSettings, progress: bool) -> TrainingReport:
    chat, lora = settings.chat is not None, settings.lora
    kind = arguments_kind(chat)
    told = {
        **({} if settings.settings is None else read_settings(Path(settings.settings), kind)),
        **settings.trainer,
    }
    trainer = {
        **DEFAULTS,
        **(LORA_DEFAULTS if lora else {}),
        **(CHAT_DEFAULTS if chat else {}),
        **hardware(settings.device),
        **({"bf16": False} if told.get("fp16") else {}),
        **({"per_device_eval_batch_size": settings.batch_size} if settings.batch_size else {}),
        **told,
    }
    sparse = settings.callback(seed=trainer["seed"])
    refuse_quantised(checkpoint, compressed=True)
    config = read_config(checkpoint)
    skeleton_of(checkpoint)
    proven = proven_cuts(config) if settings.omission else None
    pruning = settings.pruning(start=trainer["warmup_steps"])
    if pruning:
        pruning.check_shapes(config)
        if trainer.get("load_best_model_at_end"):
            raise ValueError(BEST)
    if settings.omission != "auto":
        for cuts in proven.blocks if proven else ():
            for unit, cut in cuts.items():
                units_kept(unit, cut.units, settings.omission)
    length = sequence_length(settings.length, config)
    tokenizer = load_tokenizer(checkpoint.folder)
    has_template = tokenizer.chat_template is not None
    data = _read(settings, length, tokenizer)
    evaluated = trainer.get("eval_strategy", "no") != "no" or bool(trainer.get("eval_on_start"))
    if data.validation is None and evaluated:
        raise ValueError("the settings ask for evaluation during training, which needs validation data")
    validation = None
    if data.validation is not None:
        held_out: Any = data.validation
        validation = {"data": str(settings.validation), "sha256": replace(data, train=held_out).digest}
    chosen = {
        "model": model,
        "text": None if settings.text is None else str(settings.text),
        "chat": None if settings.chat is None else str(settings.chat),
        "field": None if chat else settings.field,
        "sha256": data.digest,
        "omission": settings.omission,
        "schedule": settings.schedule,
        "importance": settings.importance,
        "select": settings.select,
        "context": settings.context,
        "prune_to": settings.prune_to,
        "prune_end": settings.prune_end if settings.prune_to else None,
        "length": length,
        "lora": lora,
        "max_shard_size": size_in_bytes(settings.max_shard_size),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "trainer": {name: value for name, value in trainer.items() if name != "report_to"},
    }
    others = {"trl": chat, "peft": lora, "deepspeed": trainer.get("deepspeed")}
    used = ["torch", "transformers", "accelerate", *(name for name, wanted in others.items() if wanted)]
    versions = {"secateurs": __version__, **{name: version(name) for name in used}}
    identity = {
        # Not how the model was spelled, but what it is.
        "settings": {name: value for name, value in chosen.items() if name != "model"},
        "versions": versions,
        "model": checkpoint.identity(),
        # Where it is looked at in training it may decide which weights are best.
        "validation": validation and validation["sha256"] if evaluated else None,
    }
    work = TrainingFolder(Path(settings.output), identity)
    trainer["output_dir"] = str(work.checkpoints)
    with silent():
        arguments = trainer_arguments(kind, {**trainer, **data.settings})
    sharded = is_sharded()
    if sharded and lora:
        raise ValueError("adapters are trained whole here: leave out lora, or fsdp and deepspeed")
    if pruning and is_by_deepspeed():
        raise ValueError(ZERO)
    if settings.omission and arguments.n_gpu > 1:
        raise ValueError("several GPUs, one process: start training with torchrun, or choose one GPU")
    # Compiled, the head would be compiled anew for every number of labels; DataParallel copies modules; and
    # a sharded head's weight is there for as long as the model's own code runs.
    as_it_is = arguments.torch_compile or arguments.n_gpu > 1 or sharded
    reads = settings.context == "read"
    if reads:
        _check_context(arguments, config, sharded=sharded)
    if work.finished():
        if arguments.should_save:
            work.clear()
        return _finished(work, data, tokenizer, arguments, validation, lora=lora)
    if pruning:
        pruning.span(steps_in_all(arguments, len(data.train)))
    checkpoints = bytes_at_once(
        checkpoint, arguments, rows=len(data.train), lora=lora, masks=pruning is not None
    )
    beside = bytes_of_companions(checkpoint.folder)
    work.check_room(checkpoints + checkpoint.tensor_bytes + beside)

    # Bfloat16 would round most updates away; adapters come in float32 by themselves.
    with silent(), without_deepspeed():
        loaded = load_model(checkpoint.folder, "cpu", None if lora else torch.float32)
    weights = StoredWeights(loaded, checkpoint)
    pruned = _is_pruned(loaded)
    set_seed(arguments.seed)
    adapted: Any = with_adapters(loaded, lora) if lora else loaded
    masks = Masks.of_zeros(adapted) if pruned and not pruning else None
    # Sharding makes other parameters: their zeros are found when it is done.
    callbacks: list[TrainerCallback] = [KeepZeros(None if sharded else masks)] if masks else []
    if pruning:
        pruning.check(adapted)
        callbacks.append(pruning)
    if settings.omission:
        callbacks.append(sparse)
    watch = Watch(
        sparse if settings.omission else None, pruning, keep=arguments.save_total_limit, shown=progress
    )
    arguments.save_total_limit = None
    lean = nullcontext() if as_it_is else logits_where_labels(loaded)
    pads = chat and arguments.device.type == "cpu" and not as_it_is
    joining = without_padding(loaded) if pads else nullcontext(False)
    reading = context_read_only(loaded) if reads else nullcontext(False)
    with silent(), for_training(loaded), lean, joining as unpadded, reading as read_only:
        if reads and not read_only:
            raise ValueError(
                "with this model context cannot be read by itself: of made-up tokens the loss and gradients "
                "were not its own, or its code does not take a text in parts; leave context out"
            )
        with arguments.main_process_first(local=False):
            if arguments.should_save:
                work.begin()
        run = data.trainer(
            model=adapted,
            args=arguments,
            processing_class=tokenizer,
            callbacks=[watch],  # the clock last: it counts what the others do
        )
        run.callback_handler.callbacks[:0] = callbacks  # first: loggers are to see what they log
        run.remove_callback(PrinterCallback)
        last = work.last_checkpoint()
        if last is not None:
            watch.resume(last)
        if sharded:
            weights.release()
        try:
            with work.saving():
                make_steps(run, last)
        finally:
            watch.close()
        if pruning:
            masks = pruning.masks
        if lora:
            (masks.merge_lora if masks else merge)(adapted)
        if sharded:
            weights.gather(loaded, arguments.device)
        weights.round()
        if sharded:
            weights.scatter(loaded)
        shares = shares_of(loaded) if pruning else None
        loss = None if data.validation is None else run.evaluate()["eval_loss"]
    if arguments.should_save:
        record = {
            "settings": chosen,
            "versions": versions,
            "seconds": round(watch.seconds, 3),
            "steps": run.state.global_step,
            "tokens": run.state.num_input_tokens_seen,
            "peak_memory_bytes": peak_memory_bytes(arguments.device),
            "flops": sparse.training.flops_done if settings.omission else None,
            "dense_flops": sparse.training.flops_dense if settings.omission else None,
            "rates": described(sparse.training.peaks or []) if settings.omission == "auto" else None,
            "whole": proven.whole if proven else None,
            "unpadded": unpadded,
            "pruning": pruning and {**pruning.record, "sparsity": shares},
            "train_loss": recent_loss(run.state),
            "history": history(run.state),
            "validation_loss": loss,
            "validation": validation,
        }
        work.model.mkdir()
        copy_companions(checkpoint.folder, work.model, replaced={"README.md"})
        if chat and not has_template:
            (work.model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        weights.write(work.model, most=size_in_bytes(settings.max_shard_size))
        work.finish(record, checkpoint)
    run.accelerator.wait_for_everyone()
    return TrainingReport.read(work.output)


def _finished(
    work: TrainingFolder,
    data: TextData | ChatData,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    validation: dict[str, str] | None,
    *,
    lora: int | None,
) -> TrainingReport:
    """The report of a run that is done, measured anew if the data to validate on are others."""
    report = TrainingReport.read(work.output)
    if validation is None or (report.validation or {}).get("sha256") == validation["sha256"]:
        return report
    if is_by_deepspeed():
        raise ValueError(f"'{work.output}' is finished: measure it on other data with secateurs eval")
    with silent():
        loaded = load_model(work.output, "cpu", None if lora else torch.float32)
    with silent(), for_training(loaded), set_aside(arguments) as others:
        run = data.trainer(model=loaded, args=others, processing_class=tokenizer)
        run.remove_callback(PrinterCallback)
        loss = run.evaluate()["eval_loss"]
    if arguments.should_save:
        work.amend({"validation_loss": loss, "validation": validation})
    run.accelerator.wait_for_everyone()
    return TrainingReport.read(work.output)


def _check_context(arguments: Any, config: PretrainedConfig, *, sharded: bool) -> None:
    """Raises ValueError for what needs the whole of a text at once, when its context is only to be read."""
    names = ("gradient_checkpointing", "torch_compile", "label_smoothing_factor", "neftune_noise_alpha")
    found = [name for name in (*names, "padding_free") if getattr(arguments, name, None)]
    if sharded:
        found.append("fsdp and deepspeed")
    if arguments.n_gpu > 1:
        found.append("several GPUs in one process")
    # As TRL decides whether there is a loss of routers.
    text, share = config.get_text_config(decoder=True), getattr(arguments, "router_aux_loss_coef", None)
    share = getattr(text, "router_aux_loss_coef", 0.0) if share is None else share
    if share and hasattr(text, "output_router_logits"):
        found.append("the routers' loss (set router_aux_loss_coef to 0)")
    if found:
        raise ValueError(f"a context is only read without {', '.join(found)}: leave that out, or context")


def _read(settings: TrainSettings, length: int, tokenizer: PreTrainedTokenizerBase) -> TextData | ChatData:
    """The data to train on."""
    field, validation = settings.field, settings.validation
    if settings.text is not None:
        blocks = packed_blocks(settings.text, tokenizer, length=length, field=field)
        if validation is None:
            return TextData(blocks, None)
        return TextData(
            blocks, packed_blocks(validation, tokenizer, length=length, field=field, split="evaluation")
        )
    assert settings.chat is not None
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    data = ChatData(
        load_conversations(settings.chat),
        None if validation is None else load_conversations(validation, split="evaluation"),
        length,
    )
    data.check_template(tokenizer)
    return data


def _is_pruned(model: PreTrainedModel) -> bool:
    """Whether a linear layer of the blocks holds more zeros than chance puts there."""
    anatomy = anatomy_of(model.config)
    weights = (
        matrix.of(block.get_parameter(matrix.weight))
        for block, inside in zip(model.get_submodule(anatomy.path).children(), anatomy.blocks, strict=True)
        for matrix in inside.matrices.values()
    )
    return any(int((weight == 0).sum()) > PRUNED * weight.numel() for weight in weights)
