"""examples/uptrain.py: training and held-out data, resuming after a kill, and invalid arguments."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli import tiny_model
from convert import models

from qkv.convert import convert_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

EXAMPLE = Path(__file__).parents[3] / "examples" / "uptrain.py"
BLOCK = 16
OPTIONS = ("--block", BLOCK, "--batch", 2, "--learning-rate", 3e-3, "--save-steps", 2)

KILLED = f"""
import importlib.util, os, signal, sys
from transformers import Trainer, TrainerState

def save_and_die(trainer, folder):
    trainer_save(trainer, folder)
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

trainer_save, Trainer._save_rng_state = Trainer._save_rng_state, save_and_die
spec = importlib.util.spec_from_file_location("uptrain", {str(EXAMPLE)!r})
uptrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(uptrain)
uptrain.main(sys.argv[1:])
"""
"""Dies in the middle of writing the third checkpoint, which is then without the state of the trainer."""


@pytest.fixture(scope="module")
def uptrain():
    spec = importlib.util.spec_from_file_location("uptrain", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, the same with one KV head, and a text in which each word says what the next will be."""
    place = tmp_path_factory.mktemp("uptrain")
    tiny_model.save(tiny_model.llama(attention_dropout=0.1), place / "original")
    convert_checkpoint(place / "original", place / "converted", 1)
    random.seed(1)
    start = random.choices(range(len(tiny_model.WORDS)), k=200)
    words = (tiny_model.WORDS[(first + step) % len(tiny_model.WORDS)] for first in start for step in range(5))
    (place / "text.txt").write_text(" ".join(words))
    return place


def arguments(place, out, *options):
    return [*map(str, (place / "converted", place / "text.txt", out, *OPTIONS, *options))]


def loss_by_hand(folder, place):
    """Of the last twentieth of the blocks: 3 of the 62 that 1000 words fill."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)((place / "text.txt").read_text(), return_tensors="pt").input_ids[0]
    blocks = ids[: 62 * BLOCK].view(62, BLOCK)[59:]
    with torch.no_grad():
        predictions = models.load(folder)(blocks).logits[:, :-1].log_softmax(-1)
    return -predictions.gather(2, blocks[:, 1:, None]).mean().item()


def weights(folder):
    return models.load(folder).state_dict()


def test_trains_saves_and_resumes_after_a_kill(uptrain, place, tmp_path, capsys):
    options = ("--max-steps", 8, "--original", place / "original")
    uptrain.main(arguments(place, tmp_path / "whole", *options))
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "whole" / "uptraining.json").read_text())
    assert (report["steps"], report["tokens"], report["held_out_tokens"]) == (8, 8 * 2 * BLOCK, 3 * BLOCK)
    folders = {"original": place / "original", "converted": place / "converted", "uptrained": tmp_path / "whole"}
    for name, folder in folders.items():
        # Sums of fp32 in another order, by another kernel.
        assert report["losses"][name] == pytest.approx(loss_by_hand(folder, place), rel=1e-5)
        assert any(line.startswith(f"{name:9}  loss {report['losses'][name]:.4f}, perplexity ") for line in printed)
    assert report["losses"]["uptrained"] < report["losses"]["converted"]
    assert models.load(tmp_path / "whole").config.use_cache
    assert "qkv" not in (tmp_path / "whole" / "config.json").read_text()

    command = [sys.executable, "-W", "ignore", "-c", KILLED, *arguments(place, tmp_path / "killed", *options)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))[-1] == "checkpoint-6"
    assert uptrain.last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    uptrain.main(arguments(place, tmp_path / "killed", *options))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_steps_are_a_fraction_of_the_original_ones(uptrain, place, tmp_path):
    parse = lambda *options: uptrain.parse(arguments(place, tmp_path, *options))
    assert uptrain.max_steps(parse("--original-steps", 1000)) == 50
    assert uptrain.max_steps(parse("--original-steps", 1000, "--alpha", 0.1)) == 100
    assert uptrain.max_steps(parse("--max-steps", 7)) == 7


def test_the_time_limit_is_converted_to_steps_once(uptrain, place, tmp_path, monkeypatch):
    from transformers import Trainer

    train, seconds = Trainer.train, []
    options = ("--bf16", "--schedule", "constant_with_warmup")

    def timed(trainer, **options):
        """As if a step took two seconds."""
        seconds.append(2.0 * trainer.args.max_steps)
        trained = train(trainer, **options)
        trained.metrics["train_runtime"] = seconds[-1]
        return trained

    monkeypatch.setattr(Trainer, "train", timed)
    command = arguments(place, tmp_path / "out", "--minutes", 0.3, *options)
    uptrain.main(command)
    assert json.loads((tmp_path / "out" / "uptraining.json").read_text())["steps"] == 9
    assert seconds == [2.0 * uptrain.TRIAL_STEPS, 18.0]
    found = weights(tmp_path / "out")
    # Once more, there is nothing left to train.
    uptrain.main(command)
    assert len(seconds) == 2
    uptrain.main(arguments(place, tmp_path / "steps", "--max-steps", 9, *options))
    for again in ("out", "steps"):
        assert all(torch.equal(found[name], tensor) for name, tensor in weights(tmp_path / again).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "none"}, r"none is not a model: it contains no config\.json\."),
        ({"model": "bare"}, r"bare must contain the model's tokenizer; transformers says: "),
        ({"text": "none.txt"}, r"none\.txt must be a UTF-8 text: .*No such file"),
        ({"text": "bytes.txt"}, r"bytes\.txt must be a UTF-8 text: .*invalid start byte"),
        ({"text": "short.txt"}, r"short\.txt must have at least two blocks of 16 tokens; got 31 tokens\."),
        ({"out": "original"}, r"original must be a new or empty folder, or that of an interrupted run"),
        (
            {"out": "other"},
            r"other belongs to a run with another learning_rate, batch\. Give the same options, or another folder\.",
        ),
    ],
)
def test_invalid_arguments_are_refused(uptrain, place, change, message):
    (place / "bytes.txt").write_bytes(b"\xff")
    (place / "short.txt").write_text("attention " * 31)
    if not (place / "bare").is_dir():
        models.save(place / "bare", "llama")
        uptrain.claim(uptrain.parse(arguments(place, place / "other", "--max-steps", 1)))
    given = {"model": "converted", "text": "text.txt", "out": "new"} | change
    options = OPTIONS if "out" not in change else ("--block", BLOCK, "--save-steps", 2)
    with pytest.raises(SystemExit, match=f"^uptrain: .*{message}"):
        uptrain.main([*(str(place / name) for name in given.values()), *map(str, options), "--max-steps", "1"])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, r"is not a model: it contains no config\.json"),
        ("{}", "must contain a model; transformers says: "),
        ('{"model_type": "t5"}', "must contain a causal language model; got t5"),
    ],
)
def test_original_is_checked_before_a_folder_is_created(uptrain, place, tmp_path, document, message):
    if document is not None:
        (tmp_path / "config.json").write_text(document)
    given = arguments(place, tmp_path / "out", "--max-steps", 1, "--original", tmp_path)
    with pytest.raises(SystemExit, match=f"^uptrain: .*{message}"):
        uptrain.main(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "one of the arguments --max-steps --original-steps --minutes is required"),
        (("--max-steps", 1, "--minutes", 1), "not allowed with argument"),
        (("--original-steps", 10, "--alpha", 0), "--alpha must be above 0; got 0.0"),
    ],
)
def test_wrong_usage(uptrain, place, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        uptrain.parse(arguments(place, tmp_path, *options))
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(uptrain, place, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(SystemExit, match=r"not installed: accelerate\. Run pip install 'qkv\[cli\]'"):
        uptrain.main(arguments(place, tmp_path / "out", "--max-steps", 1))
