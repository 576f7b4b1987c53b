"""Trains a converted model on a text, so that it comes back to what it was: "uptraining" of Ainslie et al. 2023.

    qkv convert MODEL CONVERTED --kv-heads 1
    python examples/uptrain.py CONVERTED text.txt UPTRAINED --original MODEL --max-steps 500

UPTRAINED is a folder that plain transformers loads, in float32. The same command, given again after an interruption,
goes on from the last checkpoint in it. `accelerate launch examples/uptrain.py ...` trains on several devices, with FSDP
where accelerate is configured for it. Needs pip install 'qkv[cli]'.
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
"""The part of the steps in which the learning rate rises."""
HELD_OUT = 20
"""The last of so many parts of the text is not trained on."""
TRIAL_STEPS = 4
"""From which --minutes are counted in steps, so that the learning rate knows where the end is."""


def main(arguments: list[str] | None = None) -> None:
    """Evaluates, trains, evaluates again and saves."""
    options = parse(arguments)
    missing = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        stop(f"this needs what is not installed: {', '.join(missing)}. Run pip install 'qkv[cli]'.")
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
        stop("--minutes is for one process; give --max-steps.")
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
        trainer = prepare(checkpoint)  # Going on, Trainer would train a step more.
    else:
        trainer = prepare(options.model)
        trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = trained.metrics["train_runtime"]
    losses["uptrained"] = trainer.evaluate()["eval_loss"]
    trainer.model.config.use_cache = True  # Trainer has turned it off.
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
    """The command line."""
    parser = argparse.ArgumentParser(prog="uptrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder that `qkv convert` wrote, with its tokenizer")
    parser.add_argument("text", type=Path, help="a text in UTF-8; its last twentieth is held out")
    parser.add_argument("out", type=Path, help="the folder to write, or to go on in")
    parser.add_argument("--original", type=Path, help="the model before conversion, to compare the loss with")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max-steps", type=int, help="steps to train")
    length.add_argument("--original-steps", type=int, help="steps of the original's training")
    length.add_argument("--minutes", type=float, help="about how long to train")
    parser.add_argument("--alpha", type=float, default=0.05, help="part of --original-steps (0.05)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="the highest (3e-4)")
    parser.add_argument("--schedule", choices=("cosine", "constant_with_warmup"), default="cosine")
    parser.add_argument("--batch", type=int, default=4, help="blocks a step, on each device (4)")
    parser.add_argument("--block", type=int, default=512, help="tokens a block (512)")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, with weights in float32")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of blocks (0)")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and name not in ("seed", "bf16") and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0; got {value}")
    return options


def max_steps(options: argparse.Namespace) -> int:
    """The steps to train; -1 where the clock decides."""
    if options.original_steps is not None:
        return max(1, round(float(options.alpha) * int(options.original_steps)))
    return -1 if options.max_steps is None else int(options.max_steps)


def check_model(folder: Path) -> None:
    """Stops unless there is a causal language model in the folder."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not (folder / "config.json").is_file():
        stop(f"{folder} must be a folder with a model, and has no config.json.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        stop(f"{folder} must hold a model; transformers says: {error}")
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        stop(f"{folder} must hold a causal language model, one that continues a text; it is {config.model_type}.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder with a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        stop(f"{folder} must hold the tokenizer of the model; transformers says: {error}")


def pack(file: Path, tokenizer: Any, block: int) -> list[dict[str, Any]]:
    """The text in blocks of tokens; what is left over at its end is dropped."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{file} must be a text in UTF-8: {error}.")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2 * block:
        stop(f"{file} must have at least two blocks of {block} tokens; it has {len(ids)} tokens. Give --block or more.")
    return [{"input_ids": ids, "labels": ids} for ids in ids.unfold(0, block, block)]


def claim(options: argparse.Namespace) -> None:
    """Makes the folder, or makes sure that it is of an interrupted run with the same options."""
    wanted = {name: value if isinstance(value, (int, float)) else str(value) for name, value in vars(options).items()}
    record = options.out / "options.json"
    if record.is_file():
        found = json.loads(record.read_text())
        if changed := [name for name, value in wanted.items() if found.get(name) != value]:
            stop(f"{options.out} is of a run with another {', '.join(changed)}; give the same, or another folder.")
    elif options.out.is_dir() and any(options.out.iterdir()):
        stop(f"{options.out} must be a new folder, or one of a run that was interrupted; it holds something else.")
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(wanted, indent=1) + "\n")


def last_checkpoint(folder: Path) -> Path | None:
    """The last that is whole: the state of the trainer is what is written last."""
    whole = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """After which step it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def stop(message: str) -> NoReturn:
    """Ends with a message."""
    raise SystemExit(f"uptrain: {message}")


if __name__ == "__main__":
    main()
