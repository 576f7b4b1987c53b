"""`qkv uptrain`: training and held-out data, resuming after a kill, what is left behind, and invalid arguments."""

import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from cli import tiny_model
from convert import models

from qkv.cli import main
from qkv.convert import convert_checkpoint
from qkv.models import uptraining

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

BLOCK = 16
OPTIONS = ("--block", BLOCK, "--batch", 2, "--learning-rate", 3e-3, "--save-steps", 2)

KILLED = """
import os, signal, sys
from transformers import Trainer
from qkv.cli import main

def save_and_die(trainer, folder):
    trainer_save(trainer, folder)
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.{signal})

trainer_save, Trainer._save_rng_state = Trainer._save_rng_state, save_and_die
sys.exit(main(sys.argv[1:]))
"""
"""Ends in the middle of writing the third checkpoint, which is then without the state of the trainer."""


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
    given = (place / "converted", place / "text.txt", out, *OPTIONS, *options)
    return ["uptrain", *map(str, given)]


def run(capsys, *given):
    code = main(list(map(str, given)))
    return code, capsys.readouterr()


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


def same_weights(one, other):
    expected, found = weights(one), weights(other)
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(place):
    """What a run without interruption writes."""
    assert main(arguments(place, place / "whole", "--max-steps", 8, "--original", place / "original")) == 0
    return place / "whole"


def test_trains_reports_and_saves(capsys, place, whole, tmp_path):
    code, captured = run(
        capsys, *arguments(place, tmp_path / "out", "--max-steps", 8, "--original", place / "original")
    )
    assert code == 0 and names(tmp_path) == ["out"]
    report = json.loads((tmp_path / "out" / "uptraining.json").read_text())
    assert (report["steps"], report["tokens"], report["held_out_tokens"]) == (8, 8 * 2 * BLOCK, 3 * BLOCK)
    folders = {"original": place / "original", "converted": place / "converted", "uptrained": tmp_path / "out"}
    lines = captured.out.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'out'}"
    for name, folder in folders.items():
        # Sums of fp32 in another order, by another kernel.
        assert report["losses"][name] == pytest.approx(loss_by_hand(folder, place), rel=1e-5)
        loss = report["losses"][name]
        assert any(line.split() == [name, f"{loss:.4f}", f"{math.exp(loss):.2f}"] for line in lines)
    gained = report["losses"]["original"] - report["losses"]["uptrained"]
    assert gained > 0 and f"  usable: the loss is down by {gained:.3f} nats a token" in lines
    assert report["losses"]["uptrained"] < report["losses"]["converted"]
    steps = re.findall(r"^step (\d) of 8: loss \d\.\d{4}$", captured.err, re.MULTILINE)
    assert steps == [str(step) for step in range(1, 9)]
    assert models.load(tmp_path / "out").config.use_cache
    assert "qkv" not in (tmp_path / "out" / "config.json").read_text()
    assert not [name for name in names(tmp_path / "out") if name.endswith((".bin", ".pt"))]  # no pickles
    assert same_weights(whole, tmp_path / "out")


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_the_same_command_resumes(capsys, place, whole, tmp_path, signal):
    given = arguments(place, tmp_path / "out", "--max-steps", 8)
    code = f"import signal as _s; _s.signal(_s.SIGINT, _s.default_int_handler)\n{KILLED.format(signal=signal)}"
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *given], capture_output=True, text=True, check=False
    )
    assert names(tmp_path) == ["out.unfinished"] and ended.stdout == ""
    if signal == "SIGKILL":
        assert ended.returncode == -9, ended.stderr
        assert "checkpoint-6" in names(tmp_path / "out.unfinished")
    else:
        assert ended.returncode == 130, ended.stderr
        assert ended.stderr.splitlines()[-1] == "qkv: interrupted; the same command resumes, from step 4."
    code, captured = run(capsys, *given[:-2], "--max-steps", 9)
    assert (code, captured.out) == (1, "")
    assert "is of an interrupted run with another --max-steps. Give the same to resume it, or remove" in captured.err
    code, captured = run(capsys, *given)
    assert code == 0 and "resuming after step 4 of 8" in captured.err.splitlines()
    assert "measuring the converted model ..." not in captured.err.splitlines()  # known from before
    assert names(tmp_path) == ["out"] and same_weights(whole, tmp_path / "out")


def test_a_document_is_all_that_is_printed(capsys, place, tmp_path):
    given = arguments(place, tmp_path / "out", "--max-steps", 2, "--json")
    code, captured = run(capsys, *given)
    found = json.loads(captured.out)
    assert code == 0 and (found["steps"], found["usable"]) == (2, None)
    assert found["losses"].keys() == {"converted", "uptrained"}
    assert found["next"][:4] == ["qkv", "demo", "--model", str(tmp_path / "out")]
    code, captured = run(capsys, *given)
    assert (code, captured.out) == (1, "") and "exists; give another folder, or --overwrite" in captured.err


def test_a_model_that_is_not_usable_yet_is_called_that(capsys, place, tmp_path, monkeypatch):
    from qkv.cli.reports import verdict

    monkeypatch.setattr(verdict, "MOST", -1.0)
    code, captured = run(
        capsys, *arguments(place, tmp_path / "out", "--max-steps", 1, "--original", place / "original")
    )
    assert code == 0 and "\n  not usable yet: the loss is " in captured.out
    further = (
        f"qkv uptrain {tmp_path / 'out'} TEXT {tmp_path / 'out-trained'} --original {place / 'original'} --minutes"
    )
    assert further in " ".join(captured.out.replace("\\\n", "").split())


def test_the_time_limit_is_converted_to_steps_once(capsys, place, tmp_path, monkeypatch):
    from transformers import Trainer

    train, seconds = Trainer.train, []
    options = ("--bf16", "--schedule", "constant_with_warmup")

    def timed(trainer, **options):
        """As if a step took two seconds. The first run stops before it writes its result."""
        seconds.append(2.0 * trainer.args.max_steps)
        trained = train(trainer, **options)
        trained.metrics["train_runtime"] = seconds[-1]
        return trained

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "train", timed)
    command = arguments(place, tmp_path / "out", "--minutes", 0.3, *options)
    with monkeypatch.context() as full:
        full.setattr(uptraining.Uptraining, "_save", fail)
        code, captured = run(capsys, *command)
    assert (code, captured.out, names(tmp_path)) == (1, "", ["out.unfinished"])
    assert "qkv: training failed. OSError: [Errno 28] No space left on device\nThe same command resumes" in captured.err
    assert seconds == [2.0 * uptraining.TRIAL_STEPS, 18.0]
    # Once more, a step is left after the last checkpoint, that of step 8, unless the last is one.
    assert run(capsys, *command)[0] == 0
    assert json.loads((tmp_path / "out" / "uptraining.json").read_text())["steps"] == 9
    assert seconds[:2] == [2.0 * uptraining.TRIAL_STEPS, 18.0]
    assert run(capsys, *arguments(place, tmp_path / "steps", "--max-steps", 9, *options))[0] == 0
    assert same_weights(tmp_path / "out", tmp_path / "steps")


def test_latent_attention_is_trained(capsys, place, tmp_path):
    assert main(["convert", str(place / "original"), str(tmp_path / "latent"), "--latent", "16"]) == 0
    given = ["uptrain", tmp_path / "latent", place / "text.txt", tmp_path / "out", *OPTIONS, "--max-steps", 3]
    assert run(capsys, *given)[0] == 0
    report = json.loads((tmp_path / "out" / "uptraining.json").read_text())
    assert report["losses"]["uptrained"] < report["losses"]["converted"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "none/of/these"},
            r"none/of/these' is not an existing file or folder, and not a valid Hub model name",
        ),
        ({"model": "empty"}, r"the folder .*empty is not a model: it contains no config\.json\."),
        ({"model": "text.txt"}, r"text\.txt is not a GGUF file: it must start with b'GGUF'; got b'"),
        ({"model": "bare"}, r"cannot load the configuration or tokenizer of .*bare'"),
        ({"model": "t5"}, r"t5 must be a causal language model; got one of kind encoder-decoder\."),
        ({"text": "none.txt"}, r"TEXT: cannot read .*none\.txt: No such file or directory\."),
        ({"text": "bytes.txt"}, r"TEXT: .*bytes\.txt must be UTF-8; got invalid start byte at byte 0\."),
        ({"text": "short.txt"}, r"short\.txt must have at least two blocks of 16 tokens; got 31 tokens\."),
        ({"out": "original"}, r"original exists; give another folder, or --overwrite to replace it\."),
        ({"out": "none/out"}, r"the parent folder .*none does not exist; create it first\."),
        ({"out": "other"}, r"other\.unfinished must be new, or of an interrupted run; it contains other files\."),
        ({"out": "file"}, r"cannot keep checkpoints in .*file\.unfinished: File exists\."),
        ({"original": "none.gguf"}, r"none\.gguf' is not an existing file or folder, and not a valid Hub model name"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_written(capsys, place, change, message):
    (place / "bytes.txt").write_bytes(b"\xff")
    (place / "short.txt").write_text("attention " * 31)
    (place / "empty").mkdir(exist_ok=True)
    (place / "other.unfinished").mkdir(exist_ok=True)
    (place / "other.unfinished" / "mine").write_text("")
    (place / "file.unfinished").write_text("")
    if not (place / "bare").is_dir():
        models.save(place / "bare", "llama")
        tiny_model.save(t5(), place / "t5", auto="AutoModelForSeq2SeqLM")
    before = names(place)
    given = {"model": "converted", "text": "text.txt", "out": "new", "original": "original"} | change
    model, original = (
        name if name.startswith("none") else place / name for name in (given["model"], given["original"])
    )
    text, out = place / given["text"], place / given["out"]
    code, captured = run(capsys, "uptrain", model, text, out, *OPTIONS, "--max-steps", 1, "--original", original)
    assert (code, captured.out, names(place)) == (1, "", before)
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err


def t5():
    from transformers import T5Config

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5Config(vocab_size=len(tiny_model.WORDS) + 2, **sizes)


@pytest.mark.parametrize("record", ["{}", "[", '{"format": "another"}'])
def test_a_record_of_something_else_is_left_alone(capsys, place, tmp_path, record):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "run.json").write_text(record)
    code, captured = run(capsys, *arguments(place, tmp_path / "out", "--max-steps", 1))
    assert (code, names(tmp_path)) == (1, ["out.unfinished"])
    assert "run.json is not the record of a run of qkv uptrain; remove " in captured.err
    assert (tmp_path / "out.unfinished" / "run.json").read_text() == record


def test_another_text_does_not_resume_and_two_runs_do_not_mix(tmp_path):
    options = {"TEXT": uptraining.fingerprint(torch.arange(9))}
    with uptraining.claimed(tmp_path / "out", options) as work:
        with pytest.raises(Exception, match=r"another run is training in .*out\.unfinished; wait for it"):
            uptraining.claimed(tmp_path / "out", options).__enter__()
        assert names(work) == ["run.json", "run.lock"]
    assert names(work) == ["run.json"]
    with uptraining.claimed(tmp_path / "out", options):
        pass
    other = {"TEXT": uptraining.fingerprint(torch.arange(1, 10))}
    with pytest.raises(Exception, match=r"of an interrupted run with another TEXT\."):
        uptraining.claimed(tmp_path / "out", other).__enter__()
    (work / "mine").write_text("")
    (work / "checkpoint-2").mkdir()
    uptraining.release(work)
    assert names(work) == ["mine"]


def test_a_link_in_the_place_of_checkpoints_is_not_followed(capsys, place, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.unfinished").symlink_to(tmp_path / "elsewhere")
    code, captured = run(capsys, *arguments(place, tmp_path / "out", "--max-steps", 1))
    assert code == 1 and "cannot keep checkpoints in " in captured.err
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --max-steps or --minutes."),
        (("--max-steps", 1, "--minutes", 1), "give either --max-steps or --minutes."),
        (("--minutes", 0), "Invalid value for '--minutes': it must be above 0; got 0."),
        (("--minutes", "nan"), "Invalid value for '--minutes': it must be above 0; got nan."),
        (("--max-steps", 0), "Invalid value for '--max-steps': it must be at least 1; got 0."),
        (("--max-steps", 1, "--learning-rate", -1), "'--learning-rate': it must be above 0; got -1."),
        (("--max-steps", 1, "--block", 1), "Invalid value for '--block': it must be at least 2; got 1."),
        (("--max-steps", 1, "--schedule", "line"), "'line' is not one of 'cosine', 'constant_with_warmup'."),
    ],
)
def test_wrong_usage(capsys, place, tmp_path, options, message):
    code, captured = run(capsys, *arguments(place, tmp_path / "out", *options))
    assert (code, captured.out, names(tmp_path)) == (2, "", [])
    assert message in captured.err


def test_several_processes_are_refused(capsys, place, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    code, captured = run(capsys, *arguments(place, tmp_path / "out", "--max-steps", 1))
    assert (
        code == 1
        and "qkv uptrain trains in one process; on several, train MODEL by transformers' Trainer" in captured.err
    )
