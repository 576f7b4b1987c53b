"""Trains a converted model on a text to recover its quality: "uptraining" (Ainslie et al. 2023).

    qkv convert MODEL CONVERTED --kv-heads 1
    python examples/uptrain.py CONVERTED text.txt UPTRAINED --original MODEL --max-steps 500

UPTRAINED is a float32 model that plain transformers loads. After an interruption, the same command resumes from the
last checkpoint. `accelerate launch examples/uptrain.py ...` trains on several devices, with FSDP where accelerate is
configured for it. Requires pip install 'qkv[cli]'.
"""

import argparse
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

WARM_UP = 0.1
"""Share of the steps with a rising learning rate."""
HELD_OUT = 20
"""One part in this many, the last of the text, is held out."""
TRIAL_STEPS = 4
"""Steps of a trial run that converts --minutes to a number of steps, which the learning rate schedule needs."""


def main(arguments: list[str] | None = None) -> None:
    """Evaluates, trains, evaluates again and saves."""
    options = parse(arguments)
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        stop(f"packages are not installed: {', '.join(missing)}. Run pip install 'qkv[cli]'.")
    from transformers import AutoModelForCausalLM, Trainer, TrainerState, TrainingArguments

    from qkv.integrations.transformers.attention import register

    register()
    for folder in filter(None, (options.model, options.original)):
        check_model(folder)
    tokenizer = load_tokenizer(options.model)
    blocks = pack(options.text, tokenizer, options.block)
    held_out = max(1, len(blocks) // HELD_OUT)
    settings = TrainingArguments(
        str(options.out),
        max_steps=max_steps(options),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=WARM_UP,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=options.seed,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        dataloader_pin_memory=False,
        report_to="none",
    )
    if options.minutes is not None and settings.world_size > 1:
        stop("--minutes requires a single process; give --max-steps instead.")
    with settings.main_process_first():
        claim(options)

    def prepare(folder: Path, settings: TrainingArguments = settings) -> Trainer:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="qkv")
        return Trainer(
            model,
            settings,
            train_dataset=blocks[:-held_out],
            eval_dataset=blocks[-held_out:],
            processing_class=tokenizer,
        )

    losses = {
        name: prepare(folder).evaluate()["eval_loss"]
        for name, folder in (("original", options.original), ("converted", options.model))
        if folder is not None
    }
    checkpoint = last_checkpoint(options.out)
    if checkpoint is not None:
        settings.max_steps = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).max_steps
    elif options.minutes is not None:
        trial = prepare(options.model, replace(settings, max_steps=TRIAL_STEPS, save_strategy="no")).train()
        settings.max_steps = max(1, round(60 * options.minutes * TRIAL_STEPS / trial.metrics["train_runtime"]))
    done, seconds = 0 if checkpoint is None else step_of(checkpoint), None
    if checkpoint is not None and done == settings.max_steps:
        trainer = prepare(checkpoint)  # Resuming, Trainer would train another step.
    else:
        trainer = prepare(options.model)
        trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = trained.metrics["train_runtime"]
    losses["uptrained"] = trainer.evaluate()["eval_loss"]
    trainer.model.config.use_cache = True  # Trainer disables it.
    trainer.save_model()
    if trainer.is_world_process_zero():
        tokens_per_step = options.batch * options.block * settings.world_size
        report = {
            "steps": settings.max_steps,
            "tokens": settings.max_steps * tokens_per_step,
            "tokens_per_second": seconds and round((settings.max_steps - done) * tokens_per_step / seconds),
            "held_out_tokens": held_out * options.block,
            "losses": losses,
        }
        (options.out / "uptraining.json").write_text(json.dumps(report, indent=1) + "\n")
        for name, loss in losses.items():
            print(f"{name:9}  loss {loss:.4f}, perplexity {math.exp(loss):,.2f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="uptrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder written by `qkv convert`, with a tokenizer")
    parser.add_argument("text", type=Path, help="text in UTF-8; the last 1/20 is held out")
    parser.add_argument("out", type=Path, help="folder to write, or to resume in")
    parser.add_argument("--original", type=Path, help="model before conversion, to compare the loss with")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max-steps", type=int, help="steps to train")
    length.add_argument("--original-steps", type=int, help="training steps of the original model; see --alpha")
    length.add_argument("--minutes", type=float, help="approximate training time")
    parser.add_argument("--alpha", type=float, default=0.05, help="share of --original-steps to train (0.05)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak learning rate (3e-4)")
    parser.add_argument("--schedule", choices=("cosine", "constant_with_warmup"), default="cosine")
    parser.add_argument("--batch", type=int, default=4, help="blocks per step and device (4)")
    parser.add_argument("--block", type=int, default=512, help="tokens per block (512)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16 with float32 weights")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints (100)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of blocks (0)")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and name not in ("seed", "bf16") and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0; got {value}")
    return options


def max_steps(options: argparse.Namespace) -> int:
    """The number of steps; -1 with --minutes, where it is not known yet."""
    if options.original_steps is not None:
        return max(1, round(float(options.alpha) * int(options.original_steps)))
    return -1 if options.max_steps is None else int(options.max_steps)


def check_model(folder: Path) -> None:
    """Stops unless the folder contains a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        stop(f"{folder} is not a model: it contains no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        stop(f"{folder} must contain a model; transformers says: {error}")
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        stop(f"{folder} must contain a causal language model; got {config.model_type}.")


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        stop(f"{folder} must contain the model's tokenizer; transformers says: {error}")


def pack(file: Path, tokenizer: Any, block: int) -> list[dict[str, Any]]:
    """Tokenises the text and splits it into blocks; an incomplete last block is dropped."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{file} must be a UTF-8 text: {error}.")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2 * block:
        stop(
            f"{file} must have at least two blocks of {block} tokens; got {len(ids)} tokens. "
            "Give a smaller --block, or more text."
        )
    return [{"input_ids": ids, "labels": ids} for ids in ids.unfold(0, block, block)]


def claim(options: argparse.Namespace) -> None:
    """Creates the output folder, or checks that it belongs to an interrupted run with the same options."""
    current = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(options).items()}
    record = options.out / "options.json"
    if record.is_file():
        earlier = json.loads(record.read_text())
        if changed := [name for name, value in current.items() if earlier.get(name) != value]:
            stop(
                f"{options.out} belongs to a run with another {', '.join(changed)}. "
                "Give the same options, or another folder."
            )
    elif options.out.is_dir() and any(options.out.iterdir()):
        stop(f"{options.out} must be a new or empty folder, or that of an interrupted run; it contains other files.")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(current, indent=1) + "\n")


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint: the trainer's state is written last."""
    complete = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def stop(message: str) -> NoReturn:
    """Exits with an error message."""
    raise SystemExit(f"uptrain: {message}")


if __name__ == "__main__":
    main()
