"""Plants one bug after another into a copy of the library and runs the tests on it: each must be found.

    python tests/mutants.py [NAME ...] [--sample N] [--jobs N]

Prints a line a bug, and exits with 1 if one survives. Those in code for an instruction set that this machine lacks are not
planted. A sample is another one every day.
"""

import argparse
import datetime as dt
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from analysis import browser

from qkv import kernels

ROOT = Path(__file__).parents[1]


NATIVE = "../../native/src"

ISA_OF = {"__AVX512F__": "avx512", "QKV_DOT_BF16": "avx512bf16", "__AMX_BF16__": "amx"}

EMULATED = ("neon", "neonbf16")
"""Instruction sets that this machine may lack: the kernel's own tests find bugs in their code, under QEMU."""

LEVEL = "-O1 -fexpensive-optimizations"
"""of optimisation, which takes half as long as -O3 and still merges products with sums, as -O3 does"""

LEFT_OUT = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "build")
"""of a copy of the repository"""

MASKS = ("test_masks.py",)
GRID = ("contract/test_grid.py",)
FUNCTIONAL = ("test_functional.py",)
LOOK = ("test_look.py",)
RECORDING = ("analysis/test_recording.py",)
PRICING = ("analysis/test_pricing.py",)
PAGE = ("analysis/test_page.py",)
BROWSER = ("analysis/test_page_in_browser.py",)
SEVEN = ("analysis/test_seven.py",)
REACH = ("analysis/test_reach.py",)
ALIGNMENT = ("convert/test_alignment.py",)
PLOTS = ("plots/test_plots.py",)
SEE = ("cli/test_see.py",)
KINDS = ("cli/test_see_kinds.py",)
BAD_INPUT = ("cli/test_see_bad_input.py",)
CONVERT = ("cli/test_convert.py",)
INSPECT = ("cli/test_inspect.py",)
UPTRAIN = ("cli/test_uptrain.py",)
KERNEL = ("kernels/test_native.py", "cache/test_int8.py", "contract/test_grid.py")
LINEAR = ("kernels/test_linear.py",)
NORM = ("kernels/test_rms_norm.py",)
MLP = ("kernels/test_gated_mlp.py",)
MODULES = ("integrations/transformers/test_norms_and_mlps.py",)
APPEND = ("cache/test_buffer.py",)
CACHES = ("cache/test_model.py",)
DOCS = ("repository/test_docs.py",)
PAGED = ("cache/test_paged.py",)
WINDOWS = ("convert/test_windows.py",)
NONFINITE = ("contract/test_nonfinite.py",)
ROTARY = ("kernels/test_rotation.py",)
ROWS = ("layers/test_rows.py", "cache/test_states.py")
STEP = ("layers/test_step.py",)
MODULE_STEP = ("integrations/transformers/test_attention_step.py",)
DECODER = ("integrations/transformers/test_decoder_step.py",)
MODEL = ("integrations/transformers/test_model_forward.py",)
COMPILED = ("integrations/transformers/test_compiled.py",)
SEQUENCES = ("test_packed.py", "test_paged.py")
HEADS = ("parallel/test_heads.py",)
PLAN = ("parallel/test_plan.py",)
OVER_RANKS = ("parallel/test_attention.py",)
CALLS_OVER_RANKS = ("parallel/test_calls.py",)
AGREEMENT = ("parallel/test_agreement.py",)
LAYERS_OVER_RANKS = ("parallel/test_layers.py",)
CONTEXT = ("parallel/test_context.py",)
COMPILING = ("parallel/test_compiling.py",)
DATA_PARALLEL = ("parallel/test_data_parallel.py",)
DRAWS = ("test_draws.py",)
SHARDED = ("parallel/test_sharded_cache.py",)


class Mutant(NamedTuple):
    """One planted bug: in ``file`` of the package, the first ``right`` becomes ``wrong``, which ``tests`` find.

    Those that need an instruction set of `EMULATED` name files in ``native/tests``, the others such in ``tests``.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    only: str = ""
    """pytest's ``-k``, or how names in ``native/tests`` begin: which of them, if some take long before they come to those
    that find it"""
    needs: str | None = None
    """the instruction set without which the code has no effect, if it is compiled for others too"""

    @property
    def is_native(self) -> bool:
        """Whether the kernel must be compiled again."""
        return self.file.startswith(NATIVE)

    @property
    def isa(self) -> str | None:
        """The instruction set that it needs, also by the ``#if`` around its code; None for any."""
        before = (ROOT / "src" / "qkv" / self.file).read_text().split(self.right)[0]
        conditions: list[str] = []
        for line in re.findall(r"^#(?:if|else|elif|endif).*", before, re.MULTILINE):
            if not line.startswith("#if"):
                conditions.pop()
            if not line.startswith("#endif"):
                conditions.append(line)
        found = [ISA_OF[name] for line in conditions for name in ISA_OF if line == f"#if defined({name})"]
        return found[-1] if found else self.needs

    @property
    def is_emulated(self) -> bool:
        """Whether tests of the kernel find it under QEMU."""
        return self.needs in EMULATED


MUTANTS = [
    Mutant("scale dropped (reference)", "backends/reference.py", "scores = scale * _product(", "scores = 1.0 * _product(", GRID),
    Mutant("a norm of all heads learns from a rank's", "layers/head_share.py", "norm.normalise(x, self.share.shared(norm.weight))", "norm.normalise(x, _local(norm.weight))", HEADS, "outputs_and"),
    Mutant("x gets the gradient of a rank's heads", "layers/head_share.py", "return copied(x, self.group) if isinstance(x, Tensor) else x", "return x", HEADS, "outputs_and"),
    Mutant("shared KV heads learn from one rank", "layers/head_share.py", "else self.share.shared(parameter)[self.rows]", "else _local(parameter)[self.rows]", HEADS, "outputs_and"),
    Mutant("slopes of the first heads on each rank", "layers/head_share.py", "None if alibi is None else alibi[self.query_heads]", "None if alibi is None else alibi[: self.query_heads.stop - self.query_heads.start]", HEADS, "outputs_and"),
    Mutant("the output's bias once for each rank", "layers/head_share.py", "out = summed(product(x, _local(linear.weight), None), self.share.group)\n        return out if linear.bias is None else out + _local(linear.bias).to(out.dtype)", "bias = None if linear.bias is None else _local(linear.bias)\n        return summed(product(x, _local(linear.weight), bias), self.share.group)", HEADS, "outputs_and"),
    Mutant("lambda learns from a rank's heads", "layers/differential.py", "difference if self._share is None else self._share.shared(difference)", "difference if self._share is None else difference.to_local()", HEADS, "differential"),
    Mutant("a position bias learns from a rank's heads", "layers/head_share.py", "{name: self.shared(parameter) for name", "{name: parameter for name", HEADS, "position_bias"),
    Mutant("a nested tensor gets the gradient of a rank's heads", "layers/head_share.py", "copied(x.values(), self.group)[None]", "x.values()[None]", HEADS, "nested"),
    Mutant("each rank draws weights of its own", "layers/head_share.py", "part.copy_(distribute_tensor(whole[name], part.device_mesh, part.placements))", "part.copy_(distribute_tensor(whole[name], part.device_mesh, part.placements, src_data_rank=None))", HEADS, "drawn"),
    Mutant("a window over ranks one key short", "parallel/plan.py", "else Keys(head, start, stop)", "else Keys(head, start + 1, stop)", PLAN),
    Mutant("sink tokens are not sent", "parallel/plan.py", "head = min(mask.sink_tokens, stop)", "head = 0", PLAN),
    Mutant("documents are read once", "parallel/plan.py", "known[0] == version and", "", PLAN, "read_again"),
    Mutant("the KV head of a last query head left out", "parallel/plan.py", "(end - 1) // group + 1", "max(end // group, first // group + 1)", PLAN, "whole_groups"),
    Mutant("sink tokens counted twice", "parallel/plan.py", " - count(high.clamp(max=mask.sink_tokens))", "", PLAN, "counted"),
    Mutant("keys begin in memory where a run sees them", "parallel/plan.py", "keys.start // period * period", "keys.start", OVER_RANKS, "has_the_bits"),
    Mutant("sink tokens nearer than they are", "parallel/schemes.py", "call.scores.alibi is not None or", "", OVER_RANKS, "has_the_bits and alibi"),
    Mutant("other keys become sinks by their new numbers", "masks.py", "sink_tokens=min(max(self.sink_tokens - start, 0), stop - start)", "sink_tokens=self.sink_tokens", OVER_RANKS, "every_case and merge"),
    Mutant("a sink logit at each rank", "parallel/schemes.py", "call.scores._replace(sink_logits=None)", "call.scores", OVER_RANKS, "every_case and merge"),
    Mutant("dropout at the place within a rank", "parallel/schemes.py", "first_key=draw.first_key + first_key", "first_key=draw.first_key", OVER_RANKS, "dropout_drops"),
    Mutant("dropout of each rank's own draw", "parallel/calls.py", "seed = of_first_rank(draw.seed, tokens.route.group, tokens.mesh.device_type)", "seed = draw.seed", OVER_RANKS, "without_a_draw"),
    Mutant("bytes of a lse forgotten", "parallel/schemes.py", "(call.value_width + 1) * wide", "call.value_width * wide", OVER_RANKS, "bytes_are"),
    Mutant("all runs at the position of the first", "parallel/schemes.py", "offset = call.offset + run.start + keys.shift()", "offset = call.offset + call.tokens.own[0].start + keys.shift()", CALLS_OVER_RANKS, "fp64"),
    Mutant("partial results in 16 bits", "parallel/schemes.py", "    wide = accumulation_dtype(call.q.dtype)\n    keys =", "    wide = call.q.dtype\n    keys =", CALLS_OVER_RANKS, "autocast"),
    Mutant("partial results under autocast", "parallel/calls.py", "if torch.is_autocast_enabled(device) else nullcontext()", "if False else nullcontext()", CALLS_OVER_RANKS, "autocast"),
    Mutant("gradients of ranks added in 16 bits", "parallel/exchange.py", "wide = torch.promote_types(dtype, torch.float32)", "wide = dtype", AGREEMENT, "in_fp32"),
    Mutant("a compiler follows the plan of a call over ranks", "parallel/attention.py", "@between_graphs\ndef attend(", "def attend(", COMPILING, "causal"),
    Mutant("a rank without tokens leaves out the weights of queries", "parallel/schemes.py", "for tensor in (self.q, *self.keys,", "for tensor in (*self.keys,", OVER_RANKS, "every_case and gather"),
    Mutant("a rank without tokens leaves the others waiting for gradients", "parallel/schemes.py", "    return depend(out, arrived.link), None", "    return out, None", DATA_PARALLEL, "DDP and one_process"),
    Mutant("a rank without tokens leaves the others waiting for those of the lse", "parallel/schemes.py", "None if lse is None else depend(lse, arrived.link)", "lse", CALLS_OVER_RANKS, "lse"),
    Mutant("values of another length over ranks", "parallel/calls.py", "x.dim() < 3 or x.shape[2] != k.shape[2]", "x.dim() < 3", OVER_RANKS, "errors"),
    Mutant("headings in the dtype of the rows", "parallel/exchange.py", "message[:heading].view(torch.uint8).copy_(_heading(route, count, like))", "message[:heading] = _heading(route, count, like).view(like.dtype)", AGREEMENT, "every_kind"),
    Mutant("a layout of the thread alone", "parallel/context.py", "_current.get() or _of_backward()", "_current.get()", CONTEXT, "another_thread"),
    Mutant("a layout of any thread", "parallel/context.py", "in_backward and len({thread for thread, _ in _entered}) == 1", "in_backward and _entered", CONTEXT, "another_thread"),
    Mutant("messages of other calls are taken", "parallel/exchange.py", "if count and heading and not torch.equal(", "if False and not torch.equal(", AGREEMENT, "another_call"),
    Mutant("calls are told apart by the length of messages", "parallel/calls.py", "call=number_of(common)", "call=0", AGREEMENT, "another_call"),
    Mutant("tensors of other shapes are compared after all", "parallel/merging.py", "agreed(_CALLER, route, lambda: _required(partial), _described)", "_required(partial)", AGREEMENT, "say_in_what"),
    Mutant("ranks agree by the text of a mask", "parallel/agreement.py", "digest_size=6).hexdigest()", "digest_size=6).hexdigest()[:0]", AGREEMENT, "disagree"),
    Mutant("tokens of a rank rotated as the first ones", "layers/over_ranks.py", "tokens.positions if positions is None else positions", "positions", LAYERS_OVER_RANKS, "is_the_layer and causal"),
    Mutant("the length of a rank scales its rotations", "layers/over_ranks.py", "length = tokens.length", "length = tokens.rows", LAYERS_OVER_RANKS, "rotary_by_length or rotary"),
    Mutant("keys of one rank for all in a later step", "layers/attention.py", "            cache.is_of_one_rank = True\n", "            pass\n", LAYERS_OVER_RANKS, "errors"),
    Mutant("a rank without tokens learns nothing of latents", "layers/over_ranks.py", "    if not tokens.rows:", "    if False:", LAYERS_OVER_RANKS, "latent"),
    Mutant("runs of a rank are documents", "integrations/transformers/over_ranks.py", "return replace(mask, document_ids=None) if", "return mask if", CONTEXT),
    Mutant("positions of a rank's tokens not compared", "integrations/transformers/over_ranks.py", "if is_known and not", "if False and not", CONTEXT, "leave_out"),
    Mutant("a marked layer alone with its tokens", "parallel/style.py", "if vars(module)[Mark.NAME].calls == vars(module).pop(_CALLS):", "if False:", CONTEXT, "leave_out"),
    Mutant("each rank has a seed of its own", "parallel/sums.py", "numbers if distributed.get_rank(group) == 0 else torch.zeros_like(numbers)", "numbers // distributed.get_world_size(group)", HEADS, "dropout"),
    Mutant("ranks drop alike", "layers/head_share.py", "Draw(seed, first_head=self.query_heads.start)", "Draw(seed)", HEADS, "dropout"),
    Mutant("another layer's keys as many as all heads read", "layers/cross_layer.py", "own = -(-q.shape[1] * self.num_kv_heads // self.num_heads)", "own = self.num_kv_heads", HEADS, "another_layer"),
    Mutant("norms of some heads learn unseen", "layers/attention.py", "        if torch.is_grad_enabled():\n            known =", "        if False:\n            known =", ("upstream/test_parallelism.py",)),
    Mutant("slopes of all heads for some, in one call", "layers/step.py", "        return \"projections return some of the heads, where all must be there\"\n", "        pass\n", ("upstream/test_parallelism.py",)),
    Mutant("keys that are cut off move a draw", "scores.py", "draw._replace(first_key=draw.first_key + start)", "draw", DRAWS),
    Mutant("a draw by the row of a call", "backends/dropout.py", "position.expand(batch, lq)[:, None] + draw.first_key", "query.expand(batch, lq)[:, None] + draw.first_key", DRAWS),
    Mutant("a draw by the key of a call", f"{NATIVE}/softmax/scores.h", "scatter(a ^ (key + first_key))", "scatter(a ^ key)", DRAWS),
    Mutant("blocks of every other rank", "parallel/sharded_cache.py", "start // turn * turn + self.rank * self.block", "start // turn * turn + (self.rank ^ 1) * self.block", SHARDED, "steps_are"),
    Mutant("a step sees the keys after it", "parallel/sharded_cache.py", "else offset + 1\n", "else offset + q.shape[2]\n", SHARDED, "steps_are"),
    Mutant("distances among the keys of a rank", "parallel/sharded_cache.py", "bias is None and scores.get(\"alibi\") is None", "bias is None", SHARDED, "scores_of"),
    Mutant("sinks on each rank", "parallel/sharded_cache.py", '**scores, "bias": None, "sink_logits": None}', '**scores, "bias": None}', SHARDED, "scores_of"),
    Mutant("a crop to as many tokens on each rank", "parallel/sharded_cache.py", "part.crop(self._blocks.count(length))", "part.crop(min(length, part.length))", SHARDED, "copied"),
    Mutant("a seen block from its first key", "parallel/sharded_cache.py", "                start += whole - rows.start\n", "", SHARDED, "steps_are"),
    Mutant("a prompt dealt out by runs", "parallel/plan.py", "at = row + part.start - run.start\n", "at = row\n", SHARDED, "dealt"),
    Mutant("ranks of tokens drop apart under heads", "parallel/calls.py", "seed = of_first_rank(draw.seed, tokens.route.group, tokens.mesh.device_type)", "seed = draw.seed", HEADS, "tokens_over"),
    Mutant("results of 16 bits merged", "parallel/sharded_cache.py", "wide = accumulation_dtype(q.dtype)", "wide = q.dtype", SHARDED, "rounded"),
    Mutant("a draw by the head of a call", f"{NATIVE}/softmax/scores.h", "(uint32_t)(t.head[r] + p.first_head)", "(uint32_t)t.head[r]", DRAWS),
    Mutant("a window cuts one key less", "look.py", "beyond = [~Mask.band(window - 1, None)", "beyond = [~Mask.band(window, None)", LOOK),
    Mutant("sink tokens cut by a window", "look.py", "Mask.padding(~is_sink[None]) if sink_tokens else", "", LOOK),
    Mutant("the sink logit leaves with the keys", "look.py", "scores=problem.scores._replace(sink_logits=None)))", "scores=problem.scores))", LOOK),
    Mutant("query heads tiled over the heads of keys", "look.py", "_saved(problem.k).repeat_interleave(problem.group, dim=1)", "_saved(problem.k).repeat(1, problem.group, 1, 1)", LOOK),
    Mutant("entropy of scores that are capped as of products", "look.py", "if not problem.scores.used():", "if True:", LOOK),
    Mutant("rows after the first few at the positions of these", "look.py", "offset=problem.offset + start,", "offset=problem.offset,", LOOK),
    Mutant("a map's means as sums", "look.py", "    mean /= sizes[:, None]\n", "", LOOK),
    Mutant("top keys beyond what suffices", "look.py", "spare = (before >= coverage)", "spare = (before > 1)", LOOK),
    Mutant("top keys counted from the first that a row sees", "look.py", "(keys + first).masked_fill", "keys.masked_fill", LOOK, "left_out"),
    Mutant("maxima of blocks from the first key that a row sees", "look.py", "max(begin - first, 0) : max(end - first, 0)", "begin:end", LOOK, "left_out"),
    Mutant("a distance from the first query", "look.py", "position - (middle + reach * mean)", "-(middle + reach * mean)", LOOK),
    Mutant("an overview's keys keep what the sink logit has", "look.py", "share, rows = share * kept[..., None], rows * kept[..., None]", "pass", LOOK),
    Mutant("numbers of 16 bits rounded again", "look.py", "torch.promote_types(problem.q.dtype, torch.float32)", "problem.q.dtype", LOOK),
    Mutant("padding on the left counted as keys before", "layer_record.py", "number = is_token.cumsum(1) + self.offset", "number = torch.ones_like(is_token).cumsum(1) + self.offset", RECORDING),
    Mutant("a few logits of a model that leaves out queries", "analysis/recording.py", "and not leaves_out", "", RECORDING),
    Mutant("a recorded model stays on qkv", "integrations/transformers/models.py", "        vars(module).update(configs)\n", "", RECORDING),
    Mutant("a recording past layers that are one call", "integrations/transformers/watching.py", "for module in model.modules()]", "for module in ()]", RECORDING),
    Mutant("the mean over heads of a group", "layer_record.py", ".amax(3)", ".mean(3)", RECORDING),
    Mutant("windows of encoders to one side", "layer_record.py", "Mask.band(w - 1, w - 1, sink_tokens) if", "w if", RECORDING),
    Mutant("queries that lose nothing counted", "layer_record.py", "return is_token & loses", "return is_token.expand(len(self.windows), -1, -1)", RECORDING),
    Mutant("windows of encoders to the keys before alone", "layer_record.py", "        if self.sees_later_keys:\n", "        if False:\n", RECORDING),
    Mutant("a cut without a number is 0", "layer_record.py", ".masked_fill(~self._loses().any(-1, keepdim=True), 0)", ".nan_to_num()", RECORDING),
    Mutant("layers between without heads left out", "integrations/transformers/watching.py", "if any(attend):", "if False:", RECORDING),
    Mutant("a window must hide keys of both texts", "layer_record.py", "max(lk, longest)", "lk", RECORDING),
    Mutant("an interrupt takes what was measured with it", "analysis/pricing.py", "            if not increases:\n                raise\n", "            raise\n", PRICING),
    Mutant("an interrupted price is of all layers", "analysis/pricing.py", "unmeasured=len(names) - len(increases)", "unmeasured=0", PRICING),
    Mutant("the padding of an encoder's text for its decoder's", "analysis/pricing.py", '"decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"', '"attention_mask"', PRICING),
    Mutant("encoders keep keys in a cache", "analysis/seen.py", 'if layer.group == "encoder":', "if False:", KINDS),
    Mutant("a context as long as what the decoder reads", "analysis/seen.py", "length = self.context.tokens", "pass", KINDS),
    Mutant("an encoder's text without its end", "models/language_model.py", "at_end = min(len(ids) - last, count - 1)", "at_end = 0", KINDS),
    Mutant("positions of RoBERTa from 0", "models/language_model.py", "return length - module.padding_idx - 1", "return length", KINDS),
    Mutant("a decoder without what it starts with", "models/language_model.py", "return torch.cat([starts.to(token_ids.dtype), token_ids], dim=1)", "return token_ids", KINDS),
    Mutant("an encoder has a price", "cli/see/reading.py", 'if kind == "encoder" and needs_loss:', "if False:", KINDS),
    Mutant("KV heads that do not divide found late", "cli/see/command.py", "        check_heads(opened, heads, pool)\n", "        pass\n", BAD_INPUT),
    Mutant("a large page found late", "cli/see/reading.py", "if maps + losses_ > LARGEST:", "if False:", BAD_INPUT),
    Mutant("a window as wide as a layer's own hides keys", "analysis/words.py", "layer.window <= window", "layer.window < window", BAD_INPUT),
    Mutant("tokens counted of a text that was not read", "cli/see/reading.py", "count - kept if is_whole else None", "count - kept", BAD_INPUT),
    Mutant("blocks of a map without a number as weight 0", "analysis/page/data.py", "weights.isnan().any(2).flatten().nonzero().flatten().tolist()", "[]", BAD_INPUT),
    Mutant("names in a report move the cursor", "cli/reports/see.py", "{_one_line(seen.model)} on {_one_line(seen.text)}", "{seen.model} on {seen.text}", BAD_INPUT),
    Mutant("devices replaced by a page", "models/output_file.py", "not (file.is_file() and _is_at_home(file))", "False", ("models/test_output_file.py",), "devices"),
    Mutant("a table of nan", "analysis/words.py", 'if math.isfinite(number) else "no number"  # + 0.0', 'if True else ""  # + 0.0', RECORDING, "no_number"),
    Mutant("tokens of a page end its script", "analysis/page/data.py", 'for character in "<>&":', 'for character in "&":', PAGE),
    Mutant("names in a page are markup", "analysis/page/markup.py", "Markup(html.escape(visible(text)))", "Markup(visible(text))", PAGE),
    Mutant("names in a page turn around", "analysis/page/markup.py", "html.escape(visible(text))", "html.escape(text)", PAGE),
    Mutant("a page's policy has the hash of another source", "analysis/page/document.py", "script-src '{_hash(script)}'", "script-src '{_hash(style)}'", PAGE),
    Mutant("a page's policy allows the network", "analysis/page/document.py", "default-src 'none'", "default-src *", PAGE),
    Mutant("a notebook's frame ends at a quote", "analysis/page/document.py", '.replace(chr(34), "&quot;")', "", PAGE),
    Mutant("codes of a page with the large byte first", "analysis/page/codes.py", 'newbyteorder("<")', 'newbyteorder(">")', PAGE),
    Mutant("tokens without a loss cost nothing in a page", "analysis/page/codes.py", ".masked_fill(~is_finite, NO_NUMBER)", "", PAGE),
    Mutant("small weights of a page are hidden", "analysis/page/codes.py", ".round().clamp(min=1)", ".round()", PAGE),
    Mutant("the loss of a page instead of its increase", "analysis/page/data.py", "codes.signed((some.loss - price.loss)[0])", "codes.signed(some.loss[0])", PAGE),
    Mutant("even weights of later queries by the mask of the first", "analysis/page/data.py", "layer.offset + start)", "layer.offset)", PAGE),
    Mutant("even weights of all keys", "analysis/page/data.py", "blocks /= sees.sum(2, keepdim=True).clamp(min=1)", "blocks /= lk", PAGE),
    Mutant("a chart of a page upside down", "analysis/page/charts.py", "HEIGHT - BOTTOM - self.y.place(y)", "TOP + self.y.place(y)", PAGE),
    Mutant("the worst head of a page is the last one", "analysis/page/pictures/cut_curves.py", "percent(by_layer[n, at].item())", "percent(by_layer[-1, at].item())", PAGE),
    Mutant("cuts of a page in the order of another", "analysis/page/pictures/cut_curves.py", "order = sorted(range(len(windows)), key=windows.__getitem__)", "order = range(len(windows))", PAGE),
    Mutant("the cache of a page does not grow", "analysis/seen.py", "heads, length = layer.kv_heads, count", "heads, length = layer.kv_heads, len(self.tokens)", PAGE),
    Mutant("chosen queries at the place of the first", "look.py", "yield _of_queries(problem, at % problem.lq, at % problem.lq + 1)", "yield _of_queries(problem, 0, 1)", LOOK),
    Mutant("the mask of the first queries for the others", "look.py", "        mask=problem.mask.select_queries(start, stop),\n        offset=problem.offset + start,", "        mask=problem.mask,\n        offset=problem.offset + start,", LOOK),
    Mutant("places from the end of the keys", "layer_record.py", "at % lq for at in queries", "at % k.shape[2] for at in queries", RECORDING, "heaviest"),
    Mutant("queries that no layer has left out", "analysis/recording.py", "if not -most <= query < most:", "if False:", RECORDING, "refused"),
    Mutant("keys after those that suffice in a row", "analysis/seen.py", "counts = (keys >= 0).sum(-1).tolist()", "counts = [keys.shape[-1]] * len(keys)", PAGE),
    Mutant("maps of layers that are not shown", "analysis/page/data.py", "if is_shown else _NO_HEADS", "if layer else _NO_HEADS", PAGE),
    Mutant("strips of keys from the first one", "analysis/page/data.py", "block[one.first : one.stop]", "block[: one.stop - one.first]", PAGE),
    Mutant("grouped queries on the mean of all heads", "analysis/seven.py", "row(pooled(groups), causal)", "row(pooled(1), causal)", SEVEN),
    Mutant("a mechanism's window one key wider", "analysis/seven.py", "Mask.causal(width)", "Mask.causal(width + 1)", SEVEN),
    Mutant("cross-attention to all keys", "analysis/seven.py", "row(k[:, :, :half])", "row(k)[:, :half]", SEVEN),
    Mutant("the last query for any", "analysis/seven.py", "own, half = q[:, :, at : at + 1]", "own, half = q[:, :, -1:]", SEVEN),
    Mutant("mechanisms without the model's softcap", "analysis/seven.py", '"scale", "softcap", ', '"scale", ', SEVEN),
    Mutant("scores of queries before the window is full", "analysis/seven.py", "near = width * n - width * (width - 1) // 2", "near = width * n", SEVEN),
    Mutant("agreement without the offset of a norm", "convert/families/agreement.py", " + family.layout.norm_offset", "", ALIGNMENT, "agreement"),
    Mutant("neighbours pooled that are not aligned", "convert/families/agreement.py", 'if how == "aligned":', "if False:", ALIGNMENT, "agreement"),
    Mutant("QK norms forgotten in agreement", "convert/families/agreement.py", "normed=normed", "normed=False", ALIGNMENT, "agreement"),
    Mutant("agreement out of the order of groups", "analysis/page/pictures/head_agreement.py", "_matrix(numbers[order][:, order], layer.groups)", "_matrix(numbers, layer.groups)", PAGE),
    Mutant("the agreement of all pairs as of a group", "analysis/words.py", "for n, group in enumerate(groups) for other in groups[:n]", "for n, group in enumerate(groups) for other in groups", PAGE),
    Mutant("a reach one token longer a layer", "analysis/reach.py", "stops[-1] + window - 1", "stops[-1] + window", REACH),
    Mutant("hidden states that are nearly equal", "analysis/reach.py", "differs = (old != new).any(1)", "differs = (old - new).abs().amax(1) > 1e-2", REACH),
    Mutant("windows that are added without effect", "analysis/reach.py", "return None if window is None else window.narrowed(q, k, options)", "return None", REACH),
    Mutant("changes of earlier tokens taken for reached", "analysis/reach.py", "outside = (at < self.position) | (", "outside = (", REACH),
    Mutant("cells of a chart on end", "analysis/page/charts.py", '"y": top, "height": bottom - top', '"y": bottom, "height": bottom - top', PAGE),
    Mutant("changes in the shade of smaller ones", "analysis/page/pictures/reach_by_layers.py", "if change[row, column] >= least)", "if change[row, column] >= least / 10)", PAGE),
    Mutant("masks turned in a notebook", "drawing.py", 'd="{_runs(pattern == kind)}"', 'd="{_runs((pattern == kind).T)}"', MASKS, "notebook"),
    Mutant("titles of masks as markup", "drawing.py", "{html.escape(text)}", "{text}", MASKS, "notebook"),
    Mutant("windows wider than their picture", "masks.py", "longest * 3 // 2", "0", MASKS, "notebook"),
    Mutant("cells that are visible in part as in whole", "drawing.py", "((2, 1), (1, 0.5))", "((2, 1), (1, 1))", MASKS, "notebook"),
    Mutant("a mask of an offset that is not known pictured", "masks.py", "(lq != lk and mask.is_positional):\n        return drawing", "False:\n        return drawing", MASKS, "pictured"),
    Mutant("a recording in a notebook without its heading", "analysis/recording.py", "heading, *rows = self._lines()", "heading, *rows = self._lines()[1:]", RECORDING, "notebook"),
    Mutant("codes of a page read with the large byte first", "analysis/page/page.js", "from.getInt16(2 * n, true)", "from.getInt16(2 * n, false)", BROWSER, "costly"),
    Mutant("the map of the first head for all", "analysis/page/page.js", "const start = head * rows * columns;", "const start = 0;", BROWSER, "map_of_a_head"),
    Mutant("a map from its last block", "analysis/page/page.js", "(2 * OCTAVES)), 255], 4 * n);", "(2 * OCTAVES)), 255], 4 * (map.weights.length - 1 - n));", BROWSER, "map_of_a_head"),
    Mutant("hidden blocks of a map coloured", "analysis/page/page.js", "if (map.even[n] === 0 || ", "if (", BROWSER, "map_of_a_head"),
    Mutant("the grid of heads walked across", "analysis/page/page.js", "ArrowDown: [layer + 1, column],", "ArrowDown: [layer, column + 1],", BROWSER, "keyboard or keys_walk or arrow"),
    Mutant("a head that Escape does not leave", "analysis/page/page.js", 'if (event.key === "Escape") closeHead();', "", BROWSER, "keyboard or keys_walk or arrow"),
    Mutant("cells say the number of the first head", "analysis/page/page.js", "const value = number.of(data.layers[layer])[head];\n    return", "const value = number.of(data.layers[layer])[0];\n    return", BROWSER, "cells_of_heads"),
    Mutant("the cheapest tokens as those that pay", "analysis/page/page.js", "shown.increase[b] - shown.increase[a]", "shown.increase[a] - shown.increase[b]", BROWSER, "costly"),
    Mutant("tokens in the colour of their neighbours", "analysis/page/page.js", "const increase = index === 0 ? NaN : shown.increase[index - 1];", "const increase = shown.increase[index];", BROWSER, "costly"),
    Mutant("the keys of another query", "analysis/page/page.js", 'layer.rows.find((one) => one.query === Number(find("query").value))', "layer.rows[0]", BROWSER, "keys_of_a_token"),
    Mutant("the keys of another head", "analysis/page/page.js", "row.heads[head];", "row.heads[0];", BROWSER, "keys_of_a_token"),
    Mutant("arcs by distance", "analysis/page/page.js", "const to = place(key);", "const to = place(row.query - key);", BROWSER, "keys_of_a_token"),
    Mutant("what is shown as what is left", "analysis/page/page.js", "percent(Math.max(0, 1 - covered))", "percent(covered)", BROWSER, "keys_of_a_token"),
    Mutant("mechanisms of the first head alone", "analysis/page/page.js", "const head = one.keys.length === 1 ? 0 : chosen;", "const head = 0;", BROWSER, "seven"),
    Mutant("hidden keys of a mechanism coloured", "analysis/page/page.js", "const stop = Math.min(one.stop, ", "const stop = Math.min(n, ", BROWSER, "seven"),
    Mutant("the map of a head that has none", "analysis/page/page.js", 'find("map-figure").hidden = of.map === null;', "", BROWSER, "without_its_map"),
    Mutant("a plotted mask of other positions", "plots/mechanisms.py", "mask.pattern(\"plots.mask\", lq, lk, offset)", "mask.pattern(\"plots.mask\", lq, lk, 0)", PLOTS),
    Mutant("a plotted grid the other way up", "plots/canvas.py", "ylim=(rows - 0.5, -0.5)", "ylim=(-0.5, rows - 0.5)", PLOTS),
    Mutant("cells of a plot between their numbers", "plots/canvas.py", "np.arange(count + 1) - 0.5", "np.arange(count + 1)", PLOTS),
    Mutant("query heads of a plot in turns on KV heads", "plots/mechanisms.py", "members = range(group * size, (group + 1) * size)", "members = range(group, num_heads, num_kv_heads)", PLOTS),
    Mutant("a plotted reach of windows without the query", "plots/mechanisms.py", "window - 1 for window in windows[:until]", "window for window in windows[:until]", PLOTS),
    Mutant("a plotted reach past a layer that sees all", "plots/mechanisms.py", "+ [longest] * (len(windows) - until)", "+ [found[-1] if found else 1] * (len(windows) - until)", PLOTS),
    Mutant("a plotted cache of a window that grows", "plots/mechanisms.py", "LayerShape(num_heads, kv_heads, head_dim, head_dim, seen)", "LayerShape(num_heads, kv_heads, head_dim, head_dim, None)", PLOTS),
    Mutant("a plotted cut of the first window", "plots/attended.py", "return by_head[at].amax(0)", "return by_head[0].amax(0)", PLOTS),
    Mutant("a plotted change instead of a cut", "plots/attended.py", "layer.cut_by_head() if of", "layer.change_by_head() if of", PLOTS),
    Mutant("plotted cuts in the order of the recording", "plots/attended.py", "for layer in layers])[:, order]", "for layer in layers])", PLOTS),
    Mutant("the best head as a thick line", "plots/attended.py", "worst = lines.amax(0)", "worst = lines.amin(0)", PLOTS),
    Mutant("a plotted map transposed", "plots/attended.py", "shown = weights[row, head]\n", "shown = weights[row, head].mT\n", PLOTS),
    Mutant("hidden blocks in the last colour", "plots/attended.py", "shown.masked_fill(shown <= 0, torch.nan)", "shown.clamp(min=1e-9)", PLOTS),
    Mutant("the loss of a token on the one before", "plots/costs.py", "torch.cat([torch.tensor([math.nan]), price.by_token[row].float().cpu()])", "torch.cat([price.by_token[row].float().cpu(), torch.tensor([math.nan])])", PLOTS),
    Mutant("tokens of a plot as formulas", "plots/costs.py", "parse_math=False", "parse_math=True", PLOTS),
    Mutant("tokens of a plot as they are", "plots/costs.py", "c if c.isprintable() else", "c if True else", PLOTS),
    Mutant("white words on any colour", "plots/costs.py", "luminance > 0.179", "luminance > 1.1", PLOTS),
    Mutant("the stretch after the one that pays most", "plots/costs.py", "(sums[count:] - sums[:-count]).argmax()", "(sums[count:] - sums[:-count]).argmax() + 1", PLOTS),
    Mutant("savings of a plot without a proposal", "plots/costs.py", "    if proposal is not None:", "    if False:", PLOTS),
    Mutant("heads of a plot in their own order beside groups", "plots/costs.py", "matrix[order][:, order]", "matrix", PLOTS),
    Mutant("ticks of bytes in decimal units", "byte_sizes.py", "return 1 << 10 * min", "return 10 ** 3 * min", ("analysis/test_page.py",)),
    Mutant("a message that names another entry", "cache/sliding.py", "more('dropped-keys')", "more('offset')", ("repository/test_error_catalogue.py",)),
    Mutant("a message without the address that the package has", "arguments.py", 'found.get("Documentation", "")', 'found.get("Source", "")', ("repository/test_error_catalogue.py",)),
    Mutant("layers of see by the cut", "cli/reports/see.py", "changes[index, first].nan_to_num", "cuts[index, first].nan_to_num", SEE),
    Mutant("changes and cuts of see exchanged", "cli/reports/see.py", "for numbers in (changes, cuts))", "for numbers in (cuts, changes))", SEE),
    Mutant("the change of a layer by its mean head", "analysis/recording.py", "layer.change_by_head().amax((1, 2))", "layer.change_by_head().mean((1, 2))", (*RECORDING, *SEE)),
    Mutant("a measured reach without the last token", "analysis/reach.py", "return [one + 1 - self.position for one in last]", "return [one - self.position for one in last]", (*REACH, *SEE)),
    Mutant("heads of other groups among those that agree", "analysis/words.py", "for a in group for b in group if a < b]", "for a in group for b in group]", SEE),
    Mutant("cells of a short picture too wide", "plots/small_svg.py", "of_style[-1][0].append(x1)", "of_style[-1][0].append(x1 + 1)", PLOTS),
    Mutant("a short picture without the edges of cells", "plots/small_svg.py", "for x in inner if has_edges else ()", "for x in ()", PLOTS),
    Mutant("texts of a short picture rounded", "plots/small_svg.py", "TAG.sub(lambda tag: PLACES.sub(lambda place: NUMBER.sub(_rounded, place[0]), tag[0]), picture)", "PLACES.sub(lambda place: NUMBER.sub(_rounded, place[0]), picture)", PLOTS),
    Mutant("one font for all texts of a short picture", "plots/small_svg.py", '"" if font[1] == usual else font[0]', '""', PLOTS),
    Mutant("a picture with random names", "plots/canvas.py", "\"svg.hashsalt\": \"qkv\", ", "", PLOTS),
    Mutant("the price of a window one token wider", "analysis/changes.py", "Mask.causal(window, sink", "Mask.causal(window + 1, sink", PRICING),
    Mutant("the price of a window instead of a layer's own mask", "analysis/changes.py", "return mask & self._mask  #", "return self._mask  #", PRICING),
    Mutant("a priced layer keeps its pooled heads", "analysis/changes.py", "self._model.set_submodule(name, layer)", "pass", PRICING),
    Mutant("losses predicted from padding counted", "analysis/pricing.py", "keep[:, 1:].bool() & keep[:, :-1].bool()", "keep[:, 1:].bool()", PRICING),
    Mutant("a loss of the token before", "analysis/pricing.py", "self.tokens[:, start + 1 : start + 1 + step]", "self.tokens[:, start : start + step][:, : self.tokens.shape[1] - 1 - start]", PRICING),
    Mutant("layers below skipped that hand on keys", "analysis/pricing.py", "if not self._can_skip():", "if False:", PRICING),
    Mutant("hooks of blocks below called on what they gave", "analysis/pricing.py", "            output = forward(*args, **kwargs)  # before hooks, which are called again\n", "            output = 1.3 * forward(*args, **kwargs)\n", PRICING),
    Mutant("hooks of a pooled layer left out", "analysis/changes.py", "for hooks in HOOKS}", "for hooks in ()}", PRICING),
    Mutant("layers that see as few keys priced", "analysis/changes.py", "mask.lookback >= self.window", "True", PRICING),
    Mutant("NaN taken for padding", "analysis/pricing.py", "loss.masked_fill(loss.isnan(), torch.inf)", "loss", PRICING),
    Mutant("the dearest layers together", "analysis/pricing.py", "self.by_layer.argsort(stable=True)", "self.by_layer.argsort(stable=True, descending=True)", PRICING),
    Mutant("the last layers together run on the outputs of unchanged ones", "analysis/pricing.py", "stack.loss_from(min(chosen))", "stack.loss_from(max(chosen))", PRICING),
    Mutant("products rounded once more under autocast", "backends/reference.py", "if a.is_meta or not", "if True or not", ("test_interoperability.py",), "autocast"),
    Mutant("scale dropped (sdpa)", "backends/sdpa.py", "        scale=problem.scores.scale,\n", "        scale=1.0,\n", GRID, "sdpa"),
    Mutant("scale of the key length", "scores.py", 'given["scale"], q.shape[3])', 'given["scale"], k.shape[2])', FUNCTIONAL),
    Mutant("causal window one wider", "masks.py", "Mask.band((window - 1) * dilation, 0", "Mask.band(window * dilation, 0", MASKS),
    Mutant("left bound off by one", "masks.py", "seen = key >= position - self.left", "seen = key > position - self.left", MASKS),
    Mutant("right bound off by one", "masks.py", "ahead = key <= position + self.right", "ahead = key < position + self.right", MASKS),
    Mutant("trimmed one key short", "masks.py", "start = min(stop, offset - left)", "start = min(stop, offset - left + 1)", MASKS),
    Mutant("a bound dropped too early", "masks.py", "offset + right >= lk - 1", "offset + right >= lk - 2", FUNCTIONAL),
    Mutant("chunks aligned with the first query", "masks.py", "torch.div(position - self.chunk_start,", "torch.div(position - position[:, :, :1] - self.chunk_start,", MASKS),
    Mutant("chunks not renumbered with their keys", "masks.py", "(self.chunk_start - start + sink_tokens) % self.chunk", "self.chunk_start", MASKS),
    Mutant("prefix one key longer", "masks.py", "key < self.prefix_tokens", "key <= self.prefix_tokens", MASKS),
    Mutant("prefix trimmed", "masks.py", "stop = max(0, end, self.prefix_tokens)", "stop = max(0, end)", MASKS),
    Mutant("dilation counted from the first key", "masks.py", "(position - key) % self.dilation == 0", "key % self.dilation == 0", MASKS),
    Mutant("global tokens see no other keys", "masks.py", "seen = seen | of_query[:, None, :, None] | self.is_global", "seen = seen | self.is_global", MASKS),
    Mutant("integers of an attention mask not validated", "masks.py", "can_read_values(tensor) and not torch.equal", "False and not torch.equal", MASKS),
    Mutant("a gap between two windows taken for visible", "bands.py", "and _meets(a, b) and _meets(b, a)", "", MASKS),
    Mutant("multiples of either dilation", "bands.py", "math.lcm(a.dilation, b.dilation)", "math.gcd(a.dilation, b.dilation)", MASKS),
    Mutant("chunks of two sizes taken for the smaller", "bands.py", "return coarse.chunk % fine.chunk == 0 and", "return", MASKS),
    Mutant("blocks of chunks begin within a chunk", "backends/blocks.py", "start += (mask.chunk_start - offset - start) % mask.chunk", "pass", GRID, "sdpa"),
    Mutant("global keys not among those of a block", "backends/blocks.py", "or mask.is_global is not None", "", GRID, "sdpa"),
    Mutant("prefix ignored (flex)", "backends/flex.py", "| (j < prefix)", "", GRID, "flex"),
    Mutant("a prefix given in pieces", "masks.py", " and _is_all_true(self._prefix <= length)", "", ("cache/test_caches.py",)),
    Mutant("chunks of the kernel one position late", f"{NATIVE}/mask/query_tile.h", "here - residue_of(here - p.chunk_start, p.chunk)", "here + 1 - residue_of(here - p.chunk_start, p.chunk)", KERNEL),
    Mutant("remainders of negative positions negative (kernel)", f"{NATIVE}/mask/query_tile.h", "return residue < 0 ? residue + size : residue;", "return residue;", KERNEL),
    Mutant("prefix of the first row for all (kernel)", f"{NATIVE}/mask/query_tile.h", "p.prefix_lengths[batch * p.prefix_lengths_batch]", "p.prefix_lengths[0]", KERNEL),
    Mutant("global rows skip blocks outside of the window (kernel)", f"{NATIVE}/mask/key_block.h", "&& t.end_global == 0 &&", "&&", KERNEL),
    Mutant("global keys seen by the rows of the window alone (kernel)", f"{NATIVE}/mask/key_block.h", "if (t.keys.is_global) add_global(t, first + begin, first + stop, from, to);", "", KERNEL),
    Mutant("blocks start one key late", "backends/blocks.py", "start + offset - left)", "start + offset - left + 1)", GRID, "sdpa"),
    Mutant("offset dropped on the way to the kernel", "backends/native.py", "else (offset, None)", "else (0, None)", GRID, "native"),
    Mutant("the first offset for all rows (kernel)", f"{NATIVE}/abi/problem.h", "p.offsets[batch * p.offsets_batch] : 0", "p.offsets[0] : 0", KERNEL),
    Mutant("offsets by row not checked against the documents (kernel)", f"{NATIVE}/abi/problem.h", "if ((p.document_ids || p.is_global) && (first < 0 || first + p.lq > p.lk)) return false;", "(void)first;", ("test_offsets.py",)),
    Mutant("offsets by row reversed where non-finite numbers are", "backends/nonfinite.py", "positions(self.lk, -self.offset, flags.device)", "positions(self.lk, self.offset, flags.device)", NONFINITE),
    Mutant("offsets by row taken for the first of them (flex)", "backends/flex.py", "offset[b] if", "offset[b * 0] if", GRID, "flex"),
    Mutant("offsets by row dropped on the fast path", "backends/native.py", "v_scale, pages, offsets, mask.keep", "v_scale, pages, None, mask.keep", ("test_offsets.py",)),
    Mutant("window one wider in the kernel", "backends/native.py", "*mask.values()", "*(mask.left if mask.left is None else mask.left + 1, *mask.values()[1:])", GRID, "native"),
    Mutant("scale dropped in the kernel", "backends/native.py", "*scores, *draw]", "1.0, *scores[1:], *draw]", GRID, "native"),
    Mutant("gradient of the lse lost in the kernel", "kernels/operators.py", "*(d_lse.data_ptr(), delta.data_ptr())", "*(0, delta.data_ptr())", ("kernels/test_numbers.py", "test_packed.py")),
    Mutant("gradient of the sinks of the wrong sign", "kernels/operators.py", 'gradients["sink_logits"] = -terms', 'gradients["sink_logits"] = terms', GRID, "native and gradients"),
    Mutant("groups interleaved (kernel)", f"{NATIVE}/mask/query_tile.h", "kv_head * members + member", "member * p.kv_heads + kv_head", KERNEL),
    Mutant("segments trimmed one key short", f"{NATIVE}/mask/key_block.h", "t.last_key[from] < first + begin", "t.last_key[from] <= first + begin", KERNEL),
    Mutant("documents of a block compared with the largest id only", f"{NATIVE}/mask/key_block.h", "t.document[r] >= part.low && t.document[r] <= part.high", "t.document[r] == part.high", KERNEL),
    Mutant("remaining heads computed as the first ones", f"{NATIVE}/attention/kernel.cpp", "tile_of(own + item / tiles, item % tiles)", "tile_of(item / tiles, item % tiles)", KERNEL),
    Mutant("documents in several runs taken for one run", f"{NATIVE}/mask/key_summary.h", "if (std::adjacent_find(names.begin(), names.end()) != names.end()) return false;", "", KERNEL),
    Mutant("documents in runs one key short", f"{NATIVE}/mask/key_summary.h", "(int32_t)(end - 1)", "(int32_t)(end - 2)", KERNEL),
    Mutant("holes in padding taken for keys", f"{NATIVE}/mask/key_summary.h", "if (std::any_of(keep + end, keep + count, [](uint8_t kept) { return kept; })) return false;", "", KERNEL),
    Mutant("sums not rescaled to the new maximum", f"{NATIVE}/attention/prefill.h", "store(state.row_sum + n * LANES, load(state.row_sum + n * LANES) * update.rescale);", "", KERNEL),
    Mutant("splits merged without their shares", f"{NATIVE}/softmax/online.h", "load(out + here) * factor + load(other.out", "load(out + here) + load(other.out", KERNEL),
    Mutant("sink forgotten in the normaliser (kernel)", f"{NATIVE}/softmax/online.h", "this->row_sum = row_sum * share + std::exp2((sink - base) * LOG2E);", "this->row_sum = row_sum * share;", KERNEL),
    Mutant("a short query starts at the weights of the block", f"{NATIVE}/attention/short_query.h", "weights + OperandPacking<Kind>::steps(s.begin) * LANES", "weights", KERNEL),
    Mutant("hidden NaN leaks in decoding", f"{NATIVE}/attention/decode.h", "write(p.dtype, clean(j), d, 0.0f);", "", KERNEL),
    Mutant("the last columns of a projection left out (kernel)", f"{NATIVE}/matmul/few_rows.cpp", "if (left > 0) {", "if (left > 1) {", LINEAR),
    Mutant("sums of a row by the rows beside it (kernel)", f"{NATIVE}/matmul/few_rows.cpp", "std::min(FEW_ROWS_CHAIN, p.in_features - d)", "std::min(FEW_ROWS_CHAIN * p.rows, p.in_features - d)", LINEAR),
    Mutant("bias of the first features for all (kernel)", f"{NATIVE}/matmul/few_rows.cpp", "(const char*)p.bias + here * size_of(p.dtype)", "(const char*)p.bias + n * size_of(p.dtype)", LINEAR),
    Mutant("rows of the weight taken for neighbours (kernel)", f"{NATIVE}/abi/fast_project.cpp", "p.weight_row = weight.strides[0];", "p.weight_row = p.in_features;", LINEAR),
    Mutant("gains of a norm meet numbers that are not rounded (kernel)", f"{NATIVE}/rowwise/rms_norm.h", "(GAIN == Gain::rounded ? round_to(dtype, y) : y)", "y", NORM),
    Mutant("squares of the last columns left out (kernel)", f"{NATIVE}/rowwise/rms_norm.h", "for (; d < width; d += LANES) {", "for (; d + LANES <= width; d += LANES) {", NORM),
    Mutant("an activation that is not rounded (kernel)", f"{NATIVE}/matmul/gated_mlp.cpp", "round_to(dtype, activate<ACTIVATION>(load_part(dtype, gate + i * ITEM, part)))", "activate<ACTIVATION>(load_part(dtype, gate + i * ITEM, part))", MLP),
    Mutant("the first half of a joined weight for both (kernel)", f"{NATIVE}/abi/fast_gated_mlp.cpp", "(const char*)both.weight + both.out_features * both.weight_row * item", "both.weight", MLP),
    Mutant("an MLP past a hook of its projections", "layers/gated_forward.py", "    parameters = parameters_of(linears)\n", "    parameters = [each for linear in linears for each in (linear.weight, linear.bias)]\n", MODULES),
    Mutant("an MLP past a hook of its activation", "layers/gated_forward.py", "if module is None or not is_called_plainly(module):", "if module is None:", MODULES),
    Mutant("a norm past a method of the instance", "layers/normed_forward.py", ' or "_norm" in own or', " or", MODULES),
    Mutant("forwards with other constants taken for copies", "layers/known_code.py", "repr(code.co_consts), ", "", MODULES),
    Mutant("a step past a hook of rotary", "layers/step.py", "        and is_called_plainly(module)\n", "", STEP),
    Mutant("a step past methods of a subclass", "layers/step.py", "if not _is_attention(kind) or not layer", "if not layer", STEP),
    Mutant("a step past append of a cache", "layers/step.py", 'if "append" in vars(cache) or type(cache).append is not _APPENDS[type(cache)]:', "if False:", STEP),
    Mutant("a step past dropout", "layers/step.py", "if layer.training and layer.dropout:", "if False:", STEP),
    Mutant("a step rotates by slots", "layers/step.py", "position, mark = cache.offset() if positions", "position, mark = (cache.offset() and 1) if positions", STEP),
    Mutant("a step rotates by counting whatever is given", "layers/step.py", "cache.offset() if positions is None else positions, cache.mark()", "cache.offset(), cache.mark()", STEP),
    Mutant("a step appends padding", "layers/step.py", "        if is_token is not None:\n", "        if False:\n", STEP),
    Mutant("a step reads a context that is another one", "layers/step.py", "            cache.require(context)\n", "            pass\n", STEP),
    Mutant("a step past a graph of the context", "layers/step.py", "        read += cache.keys()[:2]\n", "", STEP),
    Mutant("slots to spare taken for keys", "layers/step_call.py", "(keys.key_count or 0) if pages", "0 if pages", STEP),
    Mutant("slots to spare taken for keys (kernel)", f"{NATIVE}/abi/fast_layer_step.cpp", "if (key_count > 0) p.lk = key_count;", "", STEP),
    Mutant("values shorter than keys", f"{NATIVE}/abi/fast_layer_step.cpp", "if (!is_long_enough(t.values)) return false;", "", STEP),
    Mutant("sums of a second chain in place of the first", f"{NATIVE}/matmul/few_rows.cpp", "sums.is_new ? acc[i][r] : sum + acc[i][r]", "acc[i][r]", LINEAR),
    Mutant("sums of all vectors added up as half of one", f"{NATIVE}/matmul/few_rows.cpp", "sum + shuffle(sum, sum, Across<COUNT>())", "sum", LINEAR),
    Mutant("blocks of other threads left to them", f"{NATIVE}/runtime/parallel.cpp", "for (int i = 0; i < blocks; ++i)\n                for (int64_t item", "for (int i = 0; i < 1; ++i)\n                for (int64_t item", ("kernels/test_native.py",)),
    Mutant("a call of the kernel without an argument", f"{NATIVE}/abi/python_calls.cpp", "if (!are_all) return", "if (false) return", ("kernels/test_native.py",)),
    Mutant("a number beyond 64 bits in a call of the kernel", f"{NATIVE}/abi/python_calls.cpp", "python.exception() ? nullptr : python.integer(status)", "python.integer(status)", ("kernels/test_native.py",)),
    Mutant("a step without its gate", NATIVE + "/attention/layer_step.cpp", "if (step.gate_proj.out_features > 0)", "if (false)", STEP),
    Mutant("a step writes to the pages of the first row", NATIVE + "/attention/layer_step.cpp", "place_of(p, batch, slot)", "place_of(p, 0, slot)", STEP),
    Mutant("pages claimed under views", "cache/pool.py", "        torch.autograd.graph.increment_version(pool.parts)  # as torch's in-place operators do\n", "", STEP),
    Mutant("a page that others hold is written to", "cache/pool.py", "self._with_own_last_pages(shared) if shared else self", "self", PAGED),
    Mutant("a copied page stays after a call that failed", "cache/pool.py", "pool, rows = self.pool, [list(row) for row in self.rows]", "pool, rows = self.pool, self.rows", STEP),
    Mutant("a step that was refused stays counted", "layers/step.py", "        cache.restore(mark)\n", "        pass\n", STEP),
    Mutant("slots claimed under views", "cache/buffer.py", "            torch.autograd.graph.increment_version(memory)  # for views that contain these slots\n", "            pass\n", STEP),
    Mutant("slots claimed beyond the capacity", "cache/kv.py", "torch.is_grad_enabled() or (self.capacity is not None and stop > self.capacity):", "torch.is_grad_enabled():", STEP),
    Mutant("slots claimed for tokens of another dtype", "cache/base.py", "        if like.dtype is not self._dtype:\n            return False\n        for part", "        for part", ("cache/test_caches.py",)),
    Mutant("slots claimed for another batch", "cache/base.py", "if sizes[:2] != (*shape[:2],) or", "if", ("cache/test_caches.py",)),
    Mutant("slots after short rows left as they are", NATIVE + "/attention/layer_step.cpp", "if (i == p.lq - 1 && !p.pages.table) clear_slots(p, to, scales, width, batch, head);", "", STEP),
    Mutant("a step normalises queries alone", NATIVE + "/attention/layer_step.cpp", "if (step.k_norm) normalise(k,", "if (false) normalise(k,", STEP),
    Mutant("few rows past autocast", "kernels/dispatch.py", ' and not torch.is_autocast_enabled("cpu")', "", ("layers/test_projection.py", *MODULES)),
    Mutant("few rows past modes", "kernels/dispatch.py", " and not function_modes()", "", ("layers/test_projection.py", *MODULES)),
    Mutant("few rows past a patch of torch", "layers/plain.py", " or F.linear is not _LINEAR:", ":", ("layers/test_projection.py",)),
    Mutant("lazy negation ignored", "kernels/dispatch.py", " or tensor.is_neg():", ":", ("cache/test_caches.py", "test_functional.py")),
    Mutant("lazy negation of gradients ignored", "kernels/operators.py", "d_out.resolve_neg()\n", "d_out\n", FUNCTIONAL),
    Mutant("memory of caches written to under vmap", "cache/buffer.py", "            or transforms_are_active()\n", "", ("test_interoperability.py",)),
    Mutant("accelerated models keep the forward of their class", "layers/instance_forward.py", "        kind = type(module)\n", "        kind = self.__dict__.setdefault('kind', type(module))\n", ("integrations/torch/test_accelerate.py",)),
    Mutant("copies of caches sent to processes as shared memory", "cache/buffer.py", "\nsend_by_value(AppendBuffer)\n", "\n", ("cache/test_processes.py",)),
    Mutant("delta dropped", f"{NATIVE}/attention/backward.h", "weight * (d_weight - load(rows.delta + n * LANES))", "weight * d_weight", KERNEL),
    Mutant("a score of -inf taken for hidden (kernel)", f"{NATIVE}/softmax/nonfinite.h", "return x + 0.0f * x;", "return x;", ("kernels/test_cpp.py",)),
    Mutant("large scores begin at their rounded maximum", f"{NATIVE}/sizes.h", "constexpr float LARGE_SCORE = 256;", "constexpr float LARGE_SCORE = 1e37f;", ("kernels/test_numbers.py",)),
    Mutant("rows of NaN multiplied with hidden keys in the backward pass", f"{NATIVE}/attention/backward.h", "if (rows.any_nonfinite) add_nonfinite_rows(t, b, s, rows);", "", ("kernels/test_cpp.py",)),
    Mutant("one accumulation chain along the width", f"{NATIVE}/sizes.h", "constexpr int64_t F32_CHAIN = 32;", "constexpr int64_t F32_CHAIN = 1 << 20;", ("kernels/test_numbers.py",)),
    Mutant("a single query's weights from its lse", f"{NATIVE}/attention/backward.h", "(p.lq == 1 || std::fabs(lse) > LARGE_SCORE)", "std::fabs(lse) > LARGE_SCORE", ("kernels/test_numbers.py",)),
    Mutant("failed allocation of a worker ignored", f"{NATIVE}/runtime/parallel.cpp", "if (loop.failed) throw std::bad_alloc();", "", ("kernels/test_cpp.py",)),
    Mutant("softcap without its derivative", f"{NATIVE}/softmax/scores.h", "1.0f - y * y", "set1(1.0f)", KERNEL),
    Mutant("different dropout in the backward pass", f"{NATIVE}/attention/backward.h", "dropout.factors(b.first + j, n)", "dropout.factors(b.first + j + 1, n)", KERNEL),
    Mutant("order of dQ additions not awaited", f"{NATIVE}/attention/backward.h", "order.await_turn(p, t, index);", "", KERNEL),
    Mutant("causal aligned top-left in decoding", "backends/sdpa.py", "if problem.offset == 0:", "if True:", GRID, "sdpa"),
    Mutant("offset of the cache ignored", "cache/base.py", 'return {"offset": self.offset, ', 'return {"offset": 0, ', ("cache/test_caches.py",)),
    Mutant("exported window decided by its example", "masks.py", "if not torch.compiler.is_exporting():", "if True:", ("test_export.py",)),
    Mutant("rotary restarts at every chunk", "layers/cached_call.py", "offset = cache.offset(is_token)", "offset = 0", ("layers/test_rows.py",)),
    Mutant("groups interleaved (reference)", "backends/reference.py", "keys = problem.k.to(dtype).repeat_interleave(problem.group, dim=1)", "keys = problem.k.to(dtype).repeat(1, problem.group, 1, 1)", GRID),
    Mutant("groups interleaved (sdpa)", "backends/sdpa.py", "enable_gqa=grouped,", "enable_gqa=False,", GRID, "sdpa"),
    Mutant("an offset that the compiler loses", "backends/nonfinite.py", "else offset + 0", "else offset", NONFINITE),
    Mutant("masked NaN leaks", "backends/nonfinite.py", "if _is_finite(problem):", "if True:", NONFINITE),
    Mutant("rows of NaN leak into the gradients of keys that they do not see", "backends/nonfinite.py", "nan_rows = nan_rows[..., None]", "nan_rows = nan_rows[..., None] & False", NONFINITE),
    Mutant("gradients of NaN swallowed", "backends/nonfinite.py", "_nan_gradients(ctx, nan_rows, sink_logits, offset, tensors)\n        return", "[None] * 6\n        return", NONFINITE),
    Mutant("rows without a gradient add NaN", "backends/nonfinite.py", "has_grad & ~nonfinite_out", "~nonfinite_out", NONFINITE),
    Mutant("a score of -inf taken for hidden", "backends/nonfinite.py", "if _is_finite(problem):", "if problem.mask.is_full or _is_finite(problem):", NONFINITE),
    Mutant("NaN for rows without sink and keys", "backends/sinks.py", "(lse - sinks).masked_fill(empty, 0)", "(lse - sinks)", NONFINITE),
    Mutant("strided widths read as rows", "backends/sdpa.py", "tensor.stride(3) == 1 and tensor.stride(2) >= tensor.shape[3]", "True", ("contract/test_layouts.py",)),
    Mutant("negative scale passed to torch", "backends/sdpa.py", "    problem = _with_positive_scale(problem)\n", "", NONFINITE),
    Mutant("tensors without influence drop out of the graph", "backends/result.py", "(q, problem.k, v, *problem.scores.tensors())", "(q, problem.k, v)", NONFINITE),
    Mutant("visible NaN swallowed", "backends/nonfinite.py", "if nonfinite is None:", "if True:", NONFINITE),
    Mutant("sink forgotten in the normaliser (reference)", "backends/reference.py", "row_sum = row_sum + (sink - row_max).exp()", "row_sum = row_sum + 0 * (sink - row_max).exp()", GRID),
    Mutant("sink forgotten in the normaliser (sdpa)", "backends/sinks.py", "out * share[..., None]", "out", GRID, "sdpa"),
    Mutant("sink forgotten in the lse", "backends/sinks.py", "torch.logaddexp(lse.masked_fill(empty, 0), sinks)", "lse", GRID, "sdpa"),
    Mutant("sink tokens ignore the right bound", "masks.py", "ahead = key <= position + self.right", "ahead = (key <= position + self.right) | (key < self.sink_tokens)", MASKS),
    Mutant("gradient of the lse lost", "backends/sdpa.py", "torch.cat([out, -d_lse], dim=-1)", "torch.cat([out, 0 * d_lse], dim=-1)", FUNCTIONAL),
    Mutant("softcap dropped (reference)", "backends/reference.py", "scores = softcap * torch.tanh(scores / softcap)", "scores = scores", GRID),
    Mutant("alibi of the wrong sign", "backends/sdpa.py", "score = -penalty if", "score = penalty if", GRID, "sdpa"),
    Mutant("right bound off by one (flex)", "backends/flex.py", "ahead = (j <= position + right)", "ahead = (j < position + right)", GRID),
    Mutant("sink tokens hidden by the window (flex)", "backends/flex.py", "seen = seen | (j < sink_tokens)", "pass", GRID),
    Mutant("alibi of the wrong sign (flex)", "backends/flex.py", "score = score - alibi[h]", "score = score + alibi[h]", GRID),
    Mutant("documents of keys by their offset (flex)", "backends/flex.py", "_at(ids, b, position.clamp(0, lk - 1))", "_at(ids, b, i)", GRID),
    Mutant("padding inverted", "masks.py", "seen = seen & keep[:, None, None, :]", "seen = seen & ~keep[:, None, None, :]", MASKS),
    Mutant("documents by row instead of position", "masks.py", "F.pad(tensor, (0, 1))[row, position]", "F.pad(tensor, (0, 1))[row, position - position[:, :1]]", MASKS),
    Mutant("dropout while evaluating", "layers/attention.py", "self.dropout if self.training else 0.0", "self.dropout", ("layers/test_layers.py",)),
    Mutant("sliding cache one key short", "cache/sliding.py", "start = max(sinks, tokens.shape[2] - (self.window - 1))", "start = max(sinks, tokens.shape[2] - (self.window - 2))", ("cache/test_states.py",)),
    Mutant("append buffer loses tokens on reallocation", "cache/buffer.py", "memory[:, :, :length] = tokens", "pass", ("cache/test_states.py",)),
    Mutant("a failed call leaves tokens in the layers before", "cache/model_call.py", "                self._caches[name].restore(mark)\n", "                pass\n", CACHES),
    Mutant("layers with other tokens not noticed", "cache/model_call.py", "        if columns != others:\n", "        if False:\n", CACHES),
    Mutant("contexts cropped with the text", "cache/model.py", "if not cache.of_context and cache.columns]", "if cache.columns]", CACHES),
    Mutant("a mark without its buffers", "cache/base.py", "self._parts, length, rows = mark", "_, length, rows = mark", CACHES),
    Mutant("a state without the padding", "cache/state.py", "if cache._rows is None else {PADDING", "if True else {PADDING", CACHES),
    Mutant("cropped tokens restored", "cache/buffer.py", "self._start, self.length = tensor.storage_offset() // memory.stride(2), tensor.shape[2]", "pass", ("cache/test_states.py",)),
    Mutant("offset of fast-path calls dropped", "backends/native.py", "mask.sink_tokens, offset, scale)", "mask.sink_tokens, 0, scale)", ("kernels/test_native.py",)),
    # Those of matmul/amx.h and attention/decode_amx.h are found only on processors with AMX.
    Mutant("columns of packed values in another order", f"{NATIVE}/matmul/amx.h", "d + i / 4 * 8 + i % 4", "d + i", KERNEL),
    Mutant("padding of the last packed keys not cleared", f"{NATIVE}/matmul/amx.h", "store(pairs + j * t.lanes() + n * LANES, vec{});", "(void)pairs;", KERNEL),
    Mutant("all packed values assumed finite", f"{NATIVE}/matmul/amx.h", "return !nonfinite;", "return true;", KERNEL),
    Mutant("gradients of keys beyond a segment not cleared", f"{NATIVE}/matmul/amx.h", "std::fill(rest, rest + (s.last - s.first + odd) * LANES / 2, 0.0f);", "(void)rest;", KERNEL),
    Mutant("hidden NaN leaks beside the last key", f"{NATIVE}/attention/prefill.h", "OperandPacking<Kind>::clear(clean, j, d);\n    return", "(void)d;\n    return", KERNEL, needs="avx512bf16"),
    Mutant("odd columns computed as even ones", f"{NATIVE}/attention/decode_amx.h", "(vec)_mm512_slli_epi32(even, 16)", "(vec)even", KERNEL),
    Mutant("infinity leaks into the next column", f"{NATIVE}/attention/decode_amx.h", "if (any(nonfinite != 0.0f))", "if (false)", ("kernels/test_cpp.py",)),
    Mutant("scale of values dropped (kernel)", f"{NATIVE}/attention/decode.h", "weight * lanes.scales_of(p.v_scale, first + j)", "weight", KERNEL),
    Mutant("scale of keys dropped (kernel)", f"{NATIVE}/attention/decode.h", "(lanes.scales_of(p.k_scale, first + j) * q_scale)", "q_scale", KERNEL),
    Mutant("scale of queries dropped (kernel)", f"{NATIVE}/attention/decode.h", "(lanes.scales_of(p.k_scale, first + j) * q_scale)", "lanes.scales_of(p.k_scale, first + j)", KERNEL, needs="avx512"),
    Mutant("a visible NaN swallowed by the fixed-point scale", f"{NATIVE}/attention/decode_dot.h", "max(size == size ? size : set1(INF), most)", "max(size, most)", KERNEL, needs="avx512"),
    Mutant("bytes of fixed point not rounded to the nearest (kernel)", f"{NATIVE}/attention/decode_sdot.h", "vadd_s16(whole, vdup_n_s16(128))", "whole", ("test_int8.cpp",), needs="neonbf16"),
    Mutant("values of int8 paired with the wrong key (kernel)", f"{NATIVE}/attention/decode_sdot.h", "vzip1q_s8(row[0], row[2]), odd = vzip1q_s8(row[1], row[3]);\n        fours[0]", "vzip1q_s8(row[0], row[1]), odd = vzip1q_s8(row[2], row[3]);\n        fours[0]", ("test_int8.cpp",), needs="neonbf16"),
    Mutant("sums of int8 beyond 32 bits on ARM", f"{NATIVE}/attention/decode_sdot.h", "/ 128 / 4 * STEP", "/ 128 * LANES", ("test_int8.cpp",), needs="neonbf16"),
    Mutant("int8 of fp32 queries in fixed point on ARM", f"{NATIVE}/attention/decode.h", "p.dtype != Dtype::f32 && p.width <= SplitCodes", "p.width <= SplitCodes", ("test_int8.cpp",), needs="neonbf16"),
    Mutant("pairs of bf16 of other keys on ARM", f"{NATIVE}/simd/neonbf16.h", "vdup_n_u16(0x0100)", "vdup_n_u16(0x0001)", ("test_step_keys.cpp", "test_sizes.cpp"), needs="neonbf16"),
    Mutant("half of a vector of bf16 not read on ARM", f"{NATIVE}/simd/neonbf16.h", "vzip2q_u16(a, b)", "vzip1q_u16(a, b)", ("test_sizes.cpp",), "widths", needs="neonbf16"),
    Mutant("NaN lost in exponents on ARM", f"{NATIVE}/simd/neon.h", "vmaxq_f32((float32x4_t)x, least)", "vmaxnmq_f32((float32x4_t)x, least)", ("test_nonfinite.cpp",), "a_visible", needs="neon"),
    Mutant("numbers of bf16 stored behind the last column on ARM", f"{NATIVE}/simd/neon.h", "std::memcpy(data, &x, count * sizeof(uint16_t));", "std::memcpy(data, &x, sizeof x);", ("test_sizes.cpp",), "widths", needs="neon"),
    Mutant("threads of any library taken for torch's (kernel)", f"{NATIVE}/runtime/parallel.cpp", 'openmp_of(loaded)', 'openmp_of(RTLD_DEFAULT)', ("kernels/test_native.py",)),
    Mutant("lengths ignored on the fast path", f"{NATIVE}/abi/fast_forward.cpp", "if (is_given(call.lengths))", "if (false)", KERNEL),
    Mutant("one row of padding for all batches on the fast path", f"{NATIVE}/abi/fast_forward.cpp", "tensor.shape[0] == 1 ? 0 : tensor.strides[0]", "0", KERNEL),
    Mutant("packed sequences aligned top-left", "sequences.py", "offset=length - len(q)", "offset=0", ("test_packed.py",)),
    Mutant("packed sequences aligned top-left (kernel)", f"{NATIVE}/abi/sequences.cpp", "one.offset = one.lk - one.lq;", "one.offset = 0;", SEQUENCES),
    Mutant("slopes of the first sequence for all", f"{NATIVE}/abi/sequences.cpp", "one.alibi = p.alibi + n * s.alibi", "one.alibi = p.alibi", SEQUENCES),
    Mutant("the same weights dropped in all sequences", f"{NATIVE}/abi/sequences.cpp", "p.seed + (uint64_t)n * 0x9e3779b97f4a7c15u", "p.seed", SEQUENCES),
    Mutant("pages assumed consecutive", f"{NATIVE}/attention/paged.h", "if (page[1] != page[0] + 1) return false;", ";", SEQUENCES),
    Mutant("page indices not validated", f"{NATIVE}/abi/problem.h", "if (*page < 0 || *page >= p.pages.count) return false;", ";", SEQUENCES),
    Mutant("one page index too many validated", f"{NATIVE}/abi/problem.h", "entry(b, end - 1) + 1 :", "entry(b, end) + 1 :", SEQUENCES),
    Mutant("left padding in pages not skipped", f"{NATIVE}/abi/problem.h", "return (first + key) % size;", "return key % size;", SEQUENCES),
    Mutant("a window in pages one block late", f"{NATIVE}/attention/paged.h", "t.begin / BLOCK_N * BLOCK_N)", "t.begin / BLOCK_N * BLOCK_N + BLOCK_N)", SEQUENCES),
    Mutant("a shared last page written to by all that hold it", "cache/pool.py", "if seen[row[-1]] < self.pool.holders(row[-1]):", "if False:", PAGED),
    Mutant("a page copied by its last holder too", "cache/pool.py", "seen[row[-1]] < self.pool.holders", "seen[row[-1]] <= self.pool.holders", PAGED),
    Mutant("a page freed while others hold it", "cache/pool.py", "self._holders[page] -= 1", "self._holders[page] = 0", PAGED),
    Mutant("pages of a table that is gone held", "cache/pool.py", 'if "rows" in self.__dict__:', "if False:", PAGED),
    Mutant("pages of another row written to", "cache/pool.py", "[rows, slots // size]", "[rows.flip(0), slots // size]", PAGED),
    Mutant("tokens one slot late in their page", "cache/pool.py", "(pages, slots % size)", "(pages, (slots + 1) % size)", PAGED),
    Mutant("pages after a crop kept", "cache/pool.py", "cropped = PageTable(self.pool, [row[:count] for row, count in pairs])", "cropped = PageTable(self.pool, [row for row, count in pairs])", PAGED),
    Mutant("values of a copied page left behind", "cache/pool.py", "[x[source].transpose(1, 2)", "[x[to if x is pool.parts[1] else source].transpose(1, 2)", PAGED),
    Mutant("scales of a copied page left behind", "cache/pool.py", "[x[source].transpose(1, 2)", "[x[to if x.dim() == 3 else source].transpose(1, 2)", PAGED),
    Mutant("values of another dtype rounded into pages", "cache/pool.py", "not k.dtype is v.dtype is pool.token_dtype", "k.dtype is not pool.token_dtype", PAGED),
    Mutant("a state loaded into pages of another layer", "cache/paged.py", "self._check_append(k, v, *self._like(k))", "self._check_append(k, v, None, None)", PAGED),
    Mutant("scales of the first page of a split read", f"{NATIVE}/attention/paged.h", "*p.pages.entry(of.batch, key), of.kv_head, row)", "*p.pages.entry(of.batch, begin), of.kv_head, row)", PAGED),
    Mutant("scales assumed to lie as their pages", f"{NATIVE}/attention/paged.h", "return !scales.data || scales.batch == p.pages.size;", "return true;", PAGED),
    Mutant("scales of pages appended to those of the first head", f"{NATIVE}/abi/cache_append.cpp", "scale.at(page, head, place)", "scale.at(page, 0, place)", PAGED),
    Mutant("a step's scales written where they were without pages", f"{NATIVE}/attention/layer_step.cpp", "*scales.at(place.batch, head, place.row) = ", "*scales.at(batch, head, place.row) = ", STEP),
    Mutant("room in the last pages not counted down", "cache/pool.py", "        self._room -= k.shape[2]\n", "", PAGED),
    Mutant("a table without the pages that were added", "cache/pool.py", "        self._enter(new)\n", "        pass\n", PAGED),
    Mutant("gathered pages in the order of the pool", "sequences.py", "page = tables[sequence, row // page_size]", "page = tables[sequence, row // page_size].sort().values", ("test_paged.py",)),
    Mutant("gradients of unused keys not cleared", "kernels/sequences.py", "dk.zero_(), dv.zero_()", "pass", ("test_packed.py", "test_paged.py")),
    Mutant("flash-attn's cache not written", "integrations/flash_attn.py", "k_cache[slots], v_cache[slots] = k, v", "pass", ("integrations/test_flash_attn.py",)),
    Mutant("flash-attn's queries rotated apart without a mask", "integrations/flash_attn.py", ' * options["mask"].is_positional', "", ("integrations/test_flash_attn.py",)),
    Mutant("cross cache projects again", "layers/attention.py", "if context is None or cache.length:", "if context is None:", ("cache/test_caches.py",)),
    Mutant("rotary rotates in the opposite direction", "rotation.py", "first * cos_1 - second * sin_1, second * cos_2 + first * sin_2", "first * cos_1 + second * sin_1, second * cos_2 - first * sin_2", ROTARY),
    Mutant("transformers' window one wider", "integrations/transformers/masks.py", 'Mask.band(cells["sliding_window"] - 1, None)', 'Mask.band(cells["sliding_window"], None)', ("integrations/transformers/test_attention.py",)),
    Mutant("transformers' padding dropped", "integrations/transformers/masks.py", "if not keep.all():", "if False:", ("integrations/transformers/test_attention.py",)),
    Mutant("a cache read before the calls of its graph", "cache/handle.py", "    if is_written:", "    if False:", ("cache/test_compiled.py",)),
    Mutant("a cache of transformers read before the calls of its graph", "cache/handle.py", "    return any(each is layer for each in cache.layers)\n", "    return False\n", COMPILED),
    Mutant("layers of a program from the last to the first", "integrations/transformers/steps/cached_layers.py", "        calls.append((listed[place], given))\n", "        calls.insert(0, (listed[place], given))\n", COMPILED, "noticed"),
    Mutant("parameters that a program has written before its layers", "integrations/transformers/steps/cached_layers.py", "                and read.isdisjoint(map(_memory, parameters_of(module)))\n", "", COMPILED, "writes_before"),
    Mutant("parts that a program has replaced in its layers", "integrations/transformers/steps/cached_layers.py", "                and not any(_is_changed(part, effects) for part in module.modules())\n", "", COMPILED, "a_part"),
    Mutant("parameters that a program writes while its layers run", "integrations/transformers/steps/cached_layers.py", "            node.args = (*node.args[:-1], read)\n", "", COMPILED, "writes_after"),
    Mutant("layers of a program that return what it hands in", "integrations/transformers/steps/cached_layers.py", "    return out.clone() if out.data_ptr() == x.data_ptr() else out.contiguous()\n", "    return out.contiguous()\n", COMPILED, "share"),
    Mutant("parameters that a program computes ignored", "layers/operator_forward.py", "if all(map(_is_same, parameters, own)):", "if True:", ("cache/test_compiled.py",)),
    Mutant("a mask of a program known by its last row", "integrations/transformers/masks.py", "(rows == 1 and mask.left is None)", "mask.left is None", ("integrations/transformers/test_compiled.py",)),
    Mutant("padding of a program's mask lost", "integrations/transformers/masks.py", "if kind.hides_keys:", "if False:", ("integrations/transformers/test_compiled.py",)),
    Mutant("a compiled cache concatenated", "integrations/transformers/cache/append_layers.py", "if torch.is_grad_enabled() or torch.compiler.is_exporting():", "if True:", ("integrations/transformers/test_compiled.py",)),
    Mutant("views that guards make taken for other tensors", "integrations/transformers/cache/append_layers.py", "= self._keys.view(), self._values.view(), True", "= self._keys.tensor, self._values.tensor, True", ("integrations/transformers/test_compiled.py",)),
    Mutant("a tracer keeps its example's padding", "integrations/transformers/masks.py", "if kernels.is_tracing() or transforms_are_active():", "if torch.compiler.is_compiling():", ("test_tracing.py",)),
    Mutant("a decoder layer past hooks of its parts", "integrations/transformers/steps/decoder_parts.py", "    return are_called_plainly(modules, RotatedForward, is_idle)\n", "    return True\n", DECODER),
    Mutant("a decoder layer past a hook that captures", "integrations/transformers/output_capturing.py", " == MODULE and not is_capturing()", " == MODULE", DECODER),
    Mutant("a decoder layer past parts that were given back", "integrations/transformers/steps/decoder_parts.py", "if module is None or type(own) is not forward or own.is_taken_back or not own.is_of(module):", "if module is None:", DECODER),
    Mutant("a decoder layer past checkpointing", "integrations/transformers/steps/decoder_parts.py", ' or getattr(module, "gradient_checkpointing", False)', "", DECODER),
    Mutant("a decoder layer past its dropouts", "integrations/transformers/steps/decoder_parts.py", "type(dropout) is not nn.Dropout or dropout.training or not is_called_plainly(dropout)", "type(dropout) is not nn.Dropout", DECODER),
    Mutant("the eps of the first norm for all", "integrations/transformers/steps/decoder_parts.py", " or any(norm[1:] != found[0][1:] for norm in found)", "", DECODER),
    Mutant("a remembered layer past hooks", "layers/tree_state.py", "any(chain.from_iterable(hooks)) or ", "", ("layers/test_tree_state.py",)),
    Mutant("a remembered layer past forwards that were taken back", "layers/tree_state.py", " or any(map(_IS_TAKEN_BACK, self._forwards))", "", ("layers/test_instance_forward.py", "layers/test_tree_state.py", "integrations/transformers/test_decoder_step.py")),
    Mutant("a remembered layer past other attributes", "layers/tree_state.py", "if owns != attributes or ", "if ", ("layers/test_tree_state.py",)),
    Mutant("a remembered layer past another class", "layers/tree_state.py", " or [*map(type, modules)] != self.kinds", "", ("layers/test_tree_state.py",)),
    Mutant("a remembered layer past other parameters", "layers/tree_state.py", "if _places(parameters, parts, tensors) != self._places:", "if _places(parameters, parts, tensors)[2] != self._places[2]:", ("layers/test_tree_state.py",)),
    Mutant("a state that keeps what is gone", "layers/tree_state.py", "            attributes.clear()\n", "            pass\n", ("layers/test_tree_state.py",)),
    Mutant("remembered classes never asked again", "layers/tree_state.py", "        return same and [*self._inherited()] == self._bases and _functions() == self._functions\n", "        return True\n", ("layers/test_tree_state.py",)),
    Mutant("a remembered layer with the tensors of another", "integrations/transformers/steps/decoder_parts.py", "    q_gains, k_gains, a,", "    k_gains, q_gains, a,", DECODER),
    Mutant("a step of all layers past the arguments of each", "integrations/transformers/steps/decoder_step.py", "        and all(map(is_, given.values(), map(like.given.get, given, repeat(_MISSING))))\n", "", DECODER),
    Mutant("layers that share a cache at once", "integrations/transformers/steps/decoder_step.py", "layer.step.layer in caches", "False", MODEL),
    Mutant("layers after a refused one stay counted", "integrations/transformers/steps/decoder_step.py", "[written:]):\n            layer.step.restore(mark)", "[len(layers):]):\n            layer.step.restore(mark)", MODEL),
    Mutant("a loop that computes its arguments at once", "integrations/transformers/steps/layer_loops.py", "all(_is_read(value) and x not in _names(value) for value in values)", "True", MODEL),
    Mutant("a source that is not that of the code", "integrations/transformers/steps/layer_loops.py", "return definition if _does(_code_of(definition, function)) == _does(function.__code__) else None", "return definition", MODEL),
    Mutant("a model past a forward of its class", "integrations/transformers/steps/model_forward.py", " or type(self.module).forward is not self.known:", ":", MODEL),
    Mutant("a decoder layer past attributes that hide its parts", "integrations/transformers/steps/decoder_parts.py", "if not module.__dict__.keys().isdisjoint(form.names):", "if False:", DECODER),
    Mutant("layers at once of a list that loads them", "integrations/transformers/steps/layer_loops.py", '    return type(layers) is nn.ModuleList\n', '    return True\n', MODEL),
    Mutant("a loop whose layers may be replaced in it", "integrations/transformers/steps/layer_loops.py", 'isinstance(layers, ast.Subscript) and isinstance(layers.slice, ast.Slice) and _is_read(layers)', '_is_read(layers)', MODEL),
    Mutant("a loop whose number is x", "integrations/transformers/steps/layer_loops.py", ' or names[-1] in names[:-1]', '', MODEL),
    Mutant("a loop with a variable that a function reads", "integrations/transformers/steps/layer_loops.py", ' or not _are_variables(names, code)', '', MODEL),
    Mutant("a loop with arguments that read x", "integrations/transformers/steps/layer_loops.py", '_is_read(value) and x not in _names(value)', '_is_read(value)', MODEL),
    Mutant("a call of layers without its line", "integrations/transformers/steps/layer_loops.py", '    return ast.copy_location(statement(ast.copy_location(call, assign.value)), assign)\n', '    return statement(call)\n', MODEL),
    Mutant("a configuration that was given back alone stays", "integrations/transformers/models.py", "    configs += [value for _, _, value in taken]", "    configs += []", DECODER),
    Mutant("a decoder layer without its second residual (kernel)", f"{NATIVE}/attention/decoder_layer.cpp", "add(dtype, rows + t * row, out + t * out_row, width);", "add(dtype, x + t * x_row, out + t * out_row, width);", DECODER),
    Mutant("a decoder layer whose norm after attention is left out (kernel)", f"{NATIVE}/attention/decoder_layer.cpp", "if (layer.after_attention.gains) rms_norm_row(layer.after_attention, y, y);", "", DECODER),
    Mutant("a module's step past a hook", "integrations/transformers/steps/attention_step.py", '    parameters = parameters_of(linears)\n', '    parameters = [each for linear in linears for each in (linear.weight, linear.bias)]\n', MODULE_STEP),
    Mutant("a module's step past another attention function", "integrations/transformers/steps/attention_step.py", '    return interface[implementation] is attend and', '    return', MODULE_STEP),
    Mutant("a module's step past a rotation that was replaced", "integrations/transformers/steps/attention_step.py", 'if theirs is None or not is_usual(theirs, 8) or (width < head_dim and not is_usual(theirs, 4)):', 'if False:', MODULE_STEP),
    Mutant("a module's step past an update of the cache", "integrations/transformers/steps/attention_step.py", 'if any(kind.update is not update for kind, update in _UPDATES) or', 'if', MODULE_STEP),
    Mutant("a module's step that was refused stays counted", "integrations/transformers/steps/attention_step.py", '    if out is None:\n        step.restore(mark)\n', '    if out is None:\n', MODULE_STEP),
    Mutant("a step past padding", "layers/step_call.py", "        mask.keep,\n", "        None,\n", (*MODULE_STEP, *STEP)),
    Mutant("a module's step without its softcap", "integrations/transformers/steps/attention_step.py", 'rotation, softcap, None, sinks)', 'rotation, 0.0, None, sinks)', MODULE_STEP),
    Mutant("a module's step in the place of its gradient", "integrations/transformers/steps/attention_step.py", '    if torch.is_grad_enabled():\n', '    if False:\n', MODULE_STEP),
    Mutant('a forward known by its names alone', "layers/known_code.py", "*(code.co_code, code.co_names,", "*(code.co_names,", ("layers/test_known_code.py",)),
    Mutant('a window one token longer after a step', "integrations/transformers/cache/append_layers.py", 'offset + k[2] - self.sliding_window + 1)', 'offset + k[2] - self.sliding_window)', MODULE_STEP),
    Mutant("the sine of a step's tables for its cosine (kernel)", NATIVE + "/abi/rotation_tensors.h", "r.cos = data_of(cos), r.sin = data_of(sin);", "r.cos = data_of(sin), r.sin = data_of(sin);", MODULE_STEP),
    Mutant("hooks within packed layers overlooked", "integrations/transformers/unpadding.py", "if _is_hooked(module, ignored):", "if False:", ("integrations/transformers/test_unpadding_layers.py",)),
    Mutant("custom modules within packed layers overlooked", "integrations/transformers/unpadding.py", "    if package != \"transformers\":\n        return False\n", "", ("integrations/transformers/test_unpadding_layers.py",)),
    Mutant("a square batch packed", "integrations/transformers/unpadding.py", "if self.batch == self.length:", "if False:", ("integrations/transformers/test_unpadding_arguments.py",)),
    Mutant("a packed prompt appended twice", "integrations/transformers/unpadding.py", "name: _Appended() if isinstance(value, _cache_type()) else value", "name: value", ("integrations/transformers/test_unpadding.py",)),
    Mutant("a cache that is read otherwise packed", "integrations/transformers/unpadding.py", "if not _only_appends(kind)", "if False", ("integrations/transformers/test_unpadding.py",)),
    Mutant("the cache of models on another attention", "integrations/transformers/default_cache.py", "asks_for(config, NAME) and _default", "_default", ("integrations/transformers/test_default_cache.py",)),
    Mutant("a cache of the caller's own replaced", "integrations/transformers/default_cache.py", 'if is_ours and _maker(self).partition(".")[0] in _PACKAGES:', "if is_ours:", ("integrations/transformers/test_default_cache.py",)),
    Mutant("a cache that was named overruled", "integrations/transformers/default_cache.py", "    if name != NAME:\n        return False\n", "", ("integrations/transformers/test_default_cache.py",)),
    Mutant("attention not given back", "integrations/transformers/models.py", "if self.is_changed and self.copied._attn_implementation == NAME:", "if False:", ("integrations/transformers/test_one_line.py",)),
    Mutant("attention of somebody else's choice given back", "integrations/transformers/models.py", "if self.is_changed and self.copied._attn_implementation == NAME:", "if self.is_changed:", ("integrations/transformers/test_one_line.py",)),
    Mutant("a copied configuration for each of a model's parts", "integrations/transformers/models.py", "twin = _twins.get(id(config))", "twin = None", ("integrations/transformers/test_parts.py",)),
    Mutant("a configuration changed by another model shared", "integrations/transformers/models.py", "(twin.is_changed or config.to_dict() != twin.fields)", "False", ("integrations/transformers/test_parts.py",)),
    Mutant("parts of a configuration copied apart", "integrations/transformers/models.py", "{id(twin.original): twin.copied for twin in within}", "{}", ("integrations/transformers/test_parts.py",)),
    Mutant("half a module accelerated after an error", "integrations/transformers/models.py", "        _put_back(before)\n        raise\n", "        raise\n", ("integrations/transformers/test_parts.py",)),
    Mutant("a forward of somebody else taken back", "layers/instance_forward.py", "not isinstance(value, cls) or not (name", "not hasattr(value, 'own') and name != 'forward' or not (name", ("integrations/transformers/test_one_line.py",)),
    Mutant("a module kept by its forward", "layers/instance_method.py", "        self._module = weakref.ref(module)\n", "        self._module = lambda: module\n", ("layers/test_instance_forward.py",)),
    Mutant("a forward that others keep stays in effect", "layers/instance_forward.py", "self.forward(*args, **kwargs) if self.is_taken_back else ", "", ("layers/test_instance_forward.py",)),
    Mutant("a forward that hooks restore taken for another attribute", "layers/instance_forward.py", "or not (name == \"forward\" or value.is_of(module))", "or name != \"forward\"", ("layers/test_instance_forward.py",)),
    Mutant("attention behind a method of the parent not routed", "integrations/torch/reachable.py", "for base in () if kind is None else kind.__mro__:", "for base in () if kind is None else (kind,):", ("integrations/torch/test_reachable.py",)),
    Mutant("labels of the token after padding packed", "integrations/transformers/unpadding.py", " or (counts[:, 1:] & ~keep[:, :-1]).any()", "", ("integrations/transformers/test_unpadding_labels.py",)),
    Mutant("labels of an earlier call", "integrations/transformers/unpadding.py", "    if not kernels.is_tracing():\n        _calls.labels.pop(model, None)\n", "    pass\n", ("integrations/transformers/test_unpadding_labels.py",)),
    Mutant("a wrapper of somebody else dropped", "integrations/transformers/default_cache.py", "if getattr(self.owner, self.name) is self.after:", "if True:", ("integrations/transformers/test_default_cache.py",)),
    Mutant("additional outputs of a layer ignored", "integrations/transformers/unpadding.py", "or any(other is not None for other in others)", "", ("integrations/transformers/test_unpadding_arguments.py",)),
    Mutant("packed weights of torch in another order", "layers/torch_mha.py", 'for name, weight in zip("qkv", weights, strict=True):\n        state_dict', 'for name, weight in zip("kqv", weights, strict=True):\n        state_dict', ("mechanisms/test_multi_head.py",)),
    Mutant("new tokens misplaced in reallocated memory", "cache/buffer.py", "            start = length\n", "", ("cache/test_states.py",)),
    Mutant("memory of another shape reused", "cache/buffer.py", "or not (length or _matches(memory, shape, dtype, device))", "", ("cache/test_states.py",)),
    Mutant("tokens cast to the dtype of the cache", "cache/buffer.py", "memory.dtype is not new.dtype", "False", ("integrations/transformers/test_cache.py",)),
    Mutant("one text of a batch appended to all", f"{NATIVE}/abi/cache_append.cpp", "if (tokens.shape[i] != memory.shape[i]) return false;", "(void)i;", APPEND),
    Mutant("scales of new tokens over the first ones", f"{NATIVE}/abi/cache_append.cpp", "what.scale.data += start;", "", APPEND),
    Mutant("keys written before values are refused", f"{NATIVE}/abi/cache_append.cpp", "    if (additions[0].what.rows != additions[1].what.rows) return qkv::OTHER;\n", "", APPEND),
    Mutant("memory of the caller is written to", "cache/buffer.py", "is_writable: bool = False", "is_writable: bool = True", ("cache/test_buffer.py",)),
    Mutant("memory of the caller is stored", "cache/buffer.py", "else [new], dim=2)", "else [new], dim=2) if self.length else new", ("cache/test_states.py",)),
    Mutant("cropped tokens overwritten past torch's version counter", "cache/buffer.py", " or keys._cropped or values._cropped", "", ("cache/test_buffer.py",)),
    Mutant("codes overwritten past torch's version counter", "cache/int8.py", "torch.autograd.graph.increment_version((code, scale))", "pass", ("cache/test_caches.py",)),
    Mutant("windows not in int8", "layers/attention.py", "mask.sink_tokens, dtype=kept)", "mask.sink_tokens)", CACHES),
    Mutant("the dtype of rounded tokens lost with their rows", "cache/base.py", "self._autocast, self._dtype = each._autocast, each._dtype", "self._autocast = each._autocast", ("cache/test_int8.py",)),
    Mutant("transformers' window in int8 one token longer", "integrations/transformers/cache/int8_layers.py", "(self.sliding_window - 1 + count)", "(self.sliding_window + count)", ("integrations/transformers/test_cache.py",)),
    Mutant("drafts of a window rounded", "integrations/transformers/cache/int8_layers.py", "return self.record_past or super()._keeps_dtype(key_states, value_states)", "return super()._keeps_dtype(key_states, value_states)", ("integrations/transformers/test_cache.py",)),
    Mutant("copies share memory", "cache/buffer.py", "        self.share()\n        twin", "        twin", ("cache/test_caches.py",)),
    Mutant("inference tensors kept as memory", "cache/buffer.py", "and torch.is_inference_mode_enabled():", "and False:", ("cache/test_caches.py",)),
    Mutant("owner of a cache not checked", "cache/base.py", "if self._copied_owners is None or owner not in self._copied_owners:", "if False:", ("cache/test_caches.py",)),
    Mutant("another context of the same length accepted", "cache/cross.py", "if not torch.equal(_fingerprint(context), self._fingerprint):", "if False:", ("cache/test_caches.py",)),
    Mutant("tokens of a failed call kept", "layers/cached_call.py", "            cache.restore(mark)\n", "", ("cache/test_caches.py",)),
    Mutant("appended past torch's version counter", "cache/buffer.py", "if torch.is_grad_enabled() or keys.memory", "if keys.memory", APPEND),
    Mutant("keys and values appended at different places", "cache/buffer.py", "stop != values.stop or ", "", APPEND),
    Mutant("a few queries read beyond the width", f"{NATIVE}/attention/short_query.h", "count == LANES && d + FOUR <= width", "count == LANES", ("kernels/test_cpp.py",)),
    Mutant("half an update of transformers' cache kept", "integrations/transformers/cache/base_layer.py", 'if new.dim() != 4:\n', 'if name == "keys" and new.dim() != 4:\n', ("integrations/transformers/test_cache.py",)),
    Mutant("rows copied as if contiguous", f"{NATIVE}/matmul/operands.h", "from += view.row * size_of(dtype)", "from += width * size_of(dtype)", KERNEL),
    Mutant("rows packed for all tiles overwrite those of another head", f"{NATIVE}/matmul/operands.h", "to.get() + (n * p.lk + row) * width", "to.get() + row * width", KERNEL),
    Mutant("half an append kept", "cache/kv.py", "            self.restore(mark)\n            raise", "            raise", ("cache/test_int8.py", "cache/test_model.py")),
    Mutant("bounds overflow 64 bits", "kernels/structs.py", "min(keys, UNBOUNDED)", "keys", ("kernels/test_native.py",)),
    Mutant("heads split by their number instead of width", "layers/attention.py", "q = self._split_heads(project(self.q_proj, x), self.head_dim, self.q_norm)", "q = project(self.q_proj, x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)", ("upstream/test_parallelism.py",)),
    Mutant("frequencies cached while tracing", "layers/constants.py", "if kernels.is_tracing() or transforms_are_active():", "if False:", ("layers/test_state.py",)),
    Mutant("frequencies cached as inference tensors", "layers/constants.py", "with torch.inference_mode(False), without_functions():", "if True:", ("layers/test_state.py",)),
    Mutant("positions in the default dtype", "rotation.py", "positions[..., None].float()", "positions[..., None]", ("layers/test_rotary_models.py", "kernels/test_rotation.py")),
    Mutant("sines in the second and fourth quarter turn of the wrong sign", f"{NATIVE}/rowwise/sin_cos.h", "((quarter + 1) & 2) << 30", "(quarter & 2) << 30", ROTARY),
    Mutant("large angles as small ones", f"{NATIVE}/rowwise/sin_cos.h", "any(~is_small)", "false", ROTARY),
    Mutant("a gradient rotated forward", "kernels/rotation.py", "_replace(inverse=not rotation.inverse)", "_replace()", ROTARY),
    Mutant("sines of an inverse not exchanged", f"{NATIVE}/rowwise/tables.h", "cos_first, sin_second, cos_second, -sin_first", "cos_first, sin_first, cos_second, -sin_second", ROTARY),
    Mutant("product and sum of a rotation in one rounding", f"{NATIVE}/rowwise/rotate.h", "rounded(x * load(same)) +", "x * load(same) +", ROTARY),
    Mutant("another axis read", f"{NATIVE}/abi/rotation.h", "r.axes[n] < 0 ||", "false &&", ROTARY),
    Mutant("rows of a batch at the positions of the first one", f"{NATIVE}/abi/rotation_tensors.h", "tensor.shape[i] == 1 ? 0 : tensor.strides[i]", "from_last > 1 ? 0 : tensor.strides[i]", ROTARY),
    Mutant("a hooked rotary embedding passed by", "layers/rotary.py", "and is_called_plainly(rotary)", "", ROTARY),
    Mutant("a mapped rotation by the first positions", "kernels/rotation.py", "tensor.expand(copies, *tensor.shape), 0", "tensor.expand(copies, *tensor.shape), 0; return tensor[0]", ROTARY),
    Mutant("a scaling by the longest row of the batch", "layers/rotary.py", "amax(-1, keepdim=True) + 1", "amax() + 1", ("layers/test_rotary.py",)),
    Mutant("a scaling by the sequences before", "layers/attention.py", '"length": queries.lengths[queries.rows]', '"length": None', ("layers/test_jagged.py",)),
    Mutant("an attention factor for sines alone", "rotation.py", "cos * rotation.attention_factor, sin *", "cos, sin *", ("layers/test_rotary_models.py",)),
    Mutant("all axes rotate by time", "rotation.py", "positions[rotation.axes].movedim(0, -1)", "positions[rotation.axes * 0].movedim(0, -1)", ROTARY),
    Mutant("a bias of distances from key to query", "layers/position_bias.py", "distances > 0", "distances < 0", ("layers/test_position_bias.py",)),
    Mutant("a patched class of linear layers ignored", "layers/plain.py", "nn.Linear.forward is not _FORWARD", "False", ("layers/test_projection.py",)),
    Mutant("a patched weight ignored", "layers/plain.py", 'or "weight" in own', "", ("layers/test_projection.py",)),
    Mutant("a compiled linear layer ignored", "layers/plain.py", 'own.get("_compiled_call_impl") is not None', "False", ("layers/test_projection.py",)),
    Mutant("padding in front not counted", "cache/base.py", " - padding_before(is_token)", " + 0 * padding_before(is_token)", ROWS),
    Mutant("slots after a row's tokens seen", "cache/base.py", "return mask & Mask.padding(keys.lengths)", "return mask", ROWS),
    Mutant("a mask by columns read by slots", "cache/rows.py", "descending=True, stable=True)\n\n    def append", "stable=True)\n\n    def append", ROWS),
    Mutant("dropped tokens forgotten", "cache/rows.py", "slot + (self.lengths - lengths)[:, None])", "slot)", ROWS),
    Mutant("rows trimmed for others", "cache/sliding.py", "rows = self._keep_recent(rows, rows.stored + added > self._capacity)", "rows = self._keep_recent(rows, (rows.stored + added > self._capacity).any().expand(len(rows.stored)))", ROWS),
    Mutant("rows joined with their columns mixed up", "cache/base.py", "index[rows.long()] = self._batch + torch.arange(count", "index[rows.long()] = torch.arange(count", ROWS),
    Mutant("an output gate without its sigmoid", "layers/attention.py", "project(self.gate_proj, x).sigmoid()", "project(self.gate_proj, x)", ("layers/test_layers.py",)),
    Mutant("gates of the first heads after pruning", "convert/layer.py", "(layer.num_heads, -1))[query_heads].flatten(0, 1)", "(layer.num_heads, -1))[:len(query_heads)].flatten(0, 1)", ("convert/test_pruning.py",)),
    Mutant("the first map of a head alone", "layers/differential.py", "first - self.difference().to(first.dtype) * second)", "first)", ("layers/test_differential.py",)),
    Mutant("shared keys read as if they came before the queries", "layers/cross_layer.py", '{"offset": cache.offset_of_latest(count)}', '{"offset": cache.offset()}', ("layers/test_cross_layer.py",)),
    Mutant("packed values before keys", "layers/packed.py", 'for letter in "qkv"]\n', 'for letter in "qvk"]\n', ("layers/test_packed_state.py",)),
    Mutant("packed groups read as kinds", "layers/transformers_modules.py", '"dense", split_by_group)', '"dense")', ("integrations/transformers/test_layers.py",)),
    Mutant("gains of Gemma without their 1", "layers/transformers_modules.py", ".weight + kind.norm_offset", ".weight", ("integrations/transformers/test_layers.py",)),
    Mutant("jagged sequences see each other", "layers/attention.py", "mask & queries.document_mask", "mask", ("layers/test_jagged.py",)),
    Mutant("jagged positions continue across sequences", "layers/attention.py", "rotate_both(self.rotary, q, k, where)\n        if keys is", "rotate_both(self.rotary, q, k, {})\n        if keys is", ("layers/test_jagged.py",)),
    Mutant("sinks of the first sequence alone", "layers/attention.py", "keys is queries and mask.is_relative", "keys is queries", ("layers/test_jagged.py",)),
    Mutant("a closed outer block restored", "integrations/calls.py", "_innermost.set(_open_block())", "_innermost.set(entered.outer)", ("integrations/torch/test_blocks.py",)),
    Mutant("a block left in another thread stays active", "integrations/calls.py", "entered.is_open = False", "pass", ("integrations/torch/test_blocks.py",)),
    Mutant("divergence with its arguments swapped", "convert/divergence.py", "F.kl_div(log_q, log_p,", "F.kl_div(log_p, log_q,", ("convert/test_divergence.py",)),
    Mutant("groups unknown to transformers' own attention", "integrations/transformers/grouped_decoders.py", "module.num_key_value_groups = num_heads // num_kv_heads", "pass", ("convert/test_encoder_decoder.py",)),
    Mutant("query heads not reordered with their KV heads", "convert/heads/alignment.py", "view(len(self.order), -1)[self.order].flatten()", "view(len(self.order), -1).flatten()", ("convert/test_alignment.py",)),
    Mutant("fields not type-checked (configuration)", "convert/families/transformers_schema.py", "    check_fields(where, config, CONFIG)\n", "", ("convert/test_json_document.py",)),
    Mutant("fields not type-checked (GGUF)", "convert/inspect/gguf.py", "check_fields(str(path), header.fields,", "(lambda *_: None)(str(path), header.fields,", ("fuzz/test_files.py",)),
    Mutant("NaN accepted in JSON", "convert/files/json_document.py", "parse_constant=lambda word: refuse", "parse_constant=lambda word: float(word) or refuse", ("convert/test_json_document.py",)),
    Mutant("a link at the output path followed", "convert/files/staging.py", "if stat.S_ISLNK(found.st_mode):", "if False:", ("convert/test_links.py",)),
    Mutant("leftovers recognised by name only", "convert/files/own_folder.py", "return bool(header == expected)", "return True", ("convert/test_links.py",)),
    Mutant("mounts emptied", "convert/files/open_folder.py", "if inner.mount() != self.mount():", "if False:", ("convert/test_links.py",)),
    Mutant("junctions of Windows entered", "convert/files/open_folder.py", 'str(self._place) if is_elsewhere else ""', '""', ("convert/test_open_folder.py",)),
    Mutant("another folder in the place of one that was opened", "convert/files/open_folder.py", "if not os.path.samestat(self._place.lstat(), self._opened):", "if False:", ("convert/test_open_folder.py",)),
    Mutant("a marker that names a path of Windows", "convert/files/own_folder.py", " and PurePath(name).parts == tuple(parts)", "", ("convert/test_open_folder.py",)),
    Mutant("a marker removed while it is open", "convert/files/lock.py", "        os.close(descriptor)\n        remove()\n        return\n", "        remove()\n        os.close(descriptor)\n        return\n", ("convert/test_open_folder.py",)),
    Mutant("a lock that does not hold", "convert/files/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", ("convert/test_open_folder.py",)),
    Mutant("a POSIX module imported on Windows", "convert/files/lock.py", 'if sys.platform == "win32":\n    import msvcrt', 'import fcntl\nif sys.platform == "win32":\n    import msvcrt', ("repository/test_windows.py",), "lock.py or posix"),
    Mutant("latents absorbed by keys of values", "layers/latent_heads.py", "out, v_up.mT", "out, k_up.mT", ("layers/test_latent.py",)),
    Mutant("absorbed scores scaled by the width of latents", "layers/latent_heads.py", "scale=scale, **options)\n        return _by_head", "scale=None, **options)\n        return _by_head", ("layers/test_latent.py",)),
    Mutant("the dearer form of latent attention", "layers/latent_heads.py", "(2 * self.rank - widths) < 0", "(2 * self.rank - widths) > 0", ("layers/test_latent.py",)),
    Mutant("hooks of the projection of latents ignored", "layers/projection.py", "if not is_plain_linear(linear):\n        return None", "if type(linear) is not nn.Linear:\n        return None", ("layers/test_latent.py",)),
    Mutant("rotary keys cached before latents", "cache/latent.py", "torch.cat([k, v], dim=3)", "torch.cat([v, k], dim=3)", ("cache/test_states.py",)),
    Mutant("latents without a gradient", "integrations/transformers/latent.py", " or wants_grad(kv_nope, k_rot, weight)", "", ("integrations/transformers/test_latent.py",)),
    Mutant("columns joined that overlap or have a gap", "layers/latent_heads.py", "        and right.storage_offset() == left.storage_offset() + left.shape[3]\n", "", ("integrations/transformers/test_latent.py",)),
    Mutant("rotary components conjugated", "convert/heads/latents.py", "components = basis.mH @ z", "components = basis.mT @ z", ("convert/test_latent.py",)),
    Mutant("keys and values factorised out of balance", "convert/heads/latents.py", "up[:, : k.shape[1]] / balance", "up[:, : k.shape[1]]", ("convert/test_latent.py",)),
    Mutant("rotary components in the order of heads", "integrations/transformers/latent_decoders.py", "repeat_interleave(repeats, dim=2)", "repeat(1, 1, repeats)", ("convert/test_latent_checkpoint.py",)),
    Mutant("agreement that grows with a head", "convert/heads/alignment.py", "(size[:, None] * size).clamp_min", "size.clamp_min", ("convert/test_alignment.py",)),
    Mutant("partial rotary ignored while heads are aligned", "convert/families/aligned_outputs.py", "KeySymmetry(rotary_dim(where, hf_config)", "KeySymmetry(pooling.heads.head_dim", ("convert/test_alignment.py",)),
    Mutant("heads pooled by their mean unless another method is chosen", "convert/plan.py", '"mean" if family.layout is None else "aligned"', '"mean"', ("cli/test_convert.py",)),
    Mutant("a window one key short in the configuration", "convert/families/window_settings.py", '"sliding_window": next(filter(None, windows))}', '"sliding_window": next(filter(None, windows)) - 1}', WINDOWS),
    Mutant("windows in the other layers", "convert/families/window_settings.py", '"full_attention" if window is None', '"full_attention" if window is not None', WINDOWS),
    Mutant("Qwen's switch of windows forgotten", "convert/families/window_settings.py", '{**new, "use_sliding_window": True, "max', '{**new, "max', WINDOWS),
    Mutant("SmolLM3's switch of windows forgotten", "convert/families/window_settings.py", 'windows), "use_sliding_window": True}', 'windows)}', WINDOWS),
    Mutant("layers from which on Qwen has windows miscounted", "convert/families/window_settings.py", '"max_window_layers": last_full + 1}', '"max_window_layers": last_full}', WINDOWS),
    Mutant("biases of a Llama with windows dropped", "convert/families/window_settings.py", "    if biases:", "    if False:", WINDOWS),
    Mutant("defaults of Llama left to Ministral", "convert/families/window_settings.py", "if old[name] != found[name]}", "if False}", WINDOWS),
    Mutant("layer_types of a Mistral with one window kept", "convert/families/window_settings.py", ' if name != "layer_types"}\n    return {**kept', '}\n    return {**kept', WINDOWS),
    Mutant("an old version kept in a configuration of another type", "convert/families/window_settings.py", 'new["transformers_version"] = transformers.__version__', "pass", WINDOWS),
    Mutant("windows widened", "convert/families/windows.py", "if own is not None and own < window}", "if own is not None and own > 10 * window}", WINDOWS),
    Mutant("windows of layers that are not named dropped", "convert/families/windows.py", "window if layer in set(chosen) else own for", "window if layer in set(chosen) else None for", WINDOWS),
    Mutant("rotary embedding changed with the kind of a layer", "convert/families/windows.py", "    if turned:", "    if False:", WINDOWS),
    Mutant("layers named twice", "convert/families/windows.py", "    if len(set(layers)) < len(layers):", "    if False:", WINDOWS),
    Mutant("ranges of layers without their last", "cli/convert.py", "range(first, last + 1)", "range(first, max(last, first + 1))", ("cli/test_convert.py",)),
    Mutant("layers of a report ignored", "cli/convert.py", 'return proposal["window"], proposal["layers"]', 'return proposal["window"], None', ("cli/test_convert.py",)),
    Mutant("a model of 2 nats more called usable", "cli/reports/verdict.py", "after - before <= MOST", "after - before <= 2 * MOST", CONVERT, "usable"),
    Mutant("a loss that is no number called usable", "cli/reports/verdict.py", "    if math.isnan(change):", "    if False:", CONVERT, "usable"),
    Mutant("a window that cuts nothing called usable", "cli/reports/convert.py", "report.window >= compared.length", "report.window > compared.length", CONVERT, "windows_is_the_one"),
    Mutant("a dry run keeps what it made", "cli/convert.py", "stack.enter_context(tempfile.TemporaryDirectory(prefix=\"qkv-trial-\"))", "tempfile.mkdtemp(prefix=\"qkv-trial-\")", CONVERT, "dry_run"),
    Mutant("a dry run checks its output", "cli/convert.py", "if out is not None and not dry_run:", "if out is not None:", CONVERT, "dry_run"),
    Mutant("--dry-run in the command to write", "cli/convert.py", ' and name != "dry_run"', "", CONVERT, "dry_run"),
    Mutant("as many heads converted", "cli/convert.py", "    if kv_heads is None or has != {kv_heads}:", "    if True:", CONVERT, "as_many_heads"),
    Mutant("pickles downloaded", "models/model_folder.py", 'f"*{suffix}" for', 'f"{suffix}" for', CONVERT, "hub"),
    Mutant("scales of int8 forgotten", "cli/reports/layers.py", "int8_bytes(own, length)", "cache_bytes(own, length, 1)", INSPECT),
    Mutant("contexts in int8", "cli/reports/layers.py", "if not layer.cross]", "]", INSPECT),
    Mutant("encoders have a cache", "convert/inspect/modules.py", "        return True in says\n", "        return True\n", INSPECT),
    Mutant("the output projection is no attention", "convert/inspect/modules.py", "_whole(name, modules).parameters()", "module.parameters()", INSPECT),
    Mutant("layers without end built", "convert/inspect/modules.py", "            _check_counts(where, value)\n", "            pass\n", INSPECT, "refused"),
    Mutant("an incomplete checkpoint resumed", "models/uptraining.py", '"checkpoint-*/trainer_state.json"', '"checkpoint-*/config.json"', UPTRAIN, "resumes"),
    Mutant("training on what is held out", "models/uptraining.py", "self._blocks[: -self._held_out]", "self._blocks", UPTRAIN, "time_limit or resumes or reports"),
    Mutant("a run resumed with other options", "models/uptraining.py", "            if changed:", "            if False:", UPTRAIN),
    Mutant("two runs in one folder", "models/uptraining.py", "if not lock(opened) or ", "if ", UPTRAIN, "another_text"),
    Mutant("checkpoints through a link", "models/uptraining.py", "folder = parent.open(work.name)", "folder = open_folder(work)", UPTRAIN, "link"),
    Mutant("minutes converted again", "models/uptraining.py", '        if "steps" not in record:', "        if True:", UPTRAIN, "time_limit"),
    Mutant("a trial's weights trained on", "models/uptraining.py", "            model = self._load(self._opened) if self._settings.max_steps is None else model\n", "", UPTRAIN, "time_limit"),
    Mutant("sink tokens of a report ignored", "cli/convert.py", 'proposal.get("sink_tokens", 0))', "0)", ("cli/test_convert.py",)),
    Mutant("a page with a window of another size", "../../docs/from/flash-attn.md", "mask=Mask.causal(window=4), offset=9 - 5", "mask=Mask.causal(window=5), offset=9 - 5", DOCS),
    Mutant("a page with a wrong output", "../../docs/guides/cache.md", "'int8': 8.25", "'int8': 8.0", DOCS),
    Mutant("a dead link", "../../docs/guides/models.md", "(../transformers.md)", "(../transformer.md)", DOCS),
    Mutant("a dead anchor", "../../docs/guides/windows.md", "(kv-heads.md#train)", "(kv-heads.md#training)", DOCS),
    Mutant("a page that no page leads to", "../../docs/index.md", "project/studies\n", "", DOCS),
    Mutant("an option that does not exist on a page", "../../docs/guides/windows.md", "--layers 3-9", "--layer 3-9", DOCS),
    Mutant("a public name that is on no page", "../../docs/reference/api/caches.md", ".. autoclass:: LatentKVCache\n", "", DOCS),
    Mutant("the build left out of explain", "kernels/binding.py", "{_library.isa}, built by {_library.compiler}", "{_library.isa}", ("test_functional.py", "cli/test_main.py"), "build or version"),
    Mutant("Ctrl-C of any program ends without a traceback", "starting.py", '.stem == "qkv"', '.stem != "k"', ("cli/test_main.py",), "another_program"),
    Mutant("a traceback for Ctrl-C while torch is imported", "starting.py", '.stem == "qkv"', '.stem == "k"', ("cli/test_main.py",), "while_torch"),
    Mutant("an option of bench without its bound where typer is missing", "bench/options.py", "if number < self.least:", "if number < 1:", ("cli/test_main.py",), "torch_alone"),
    Mutant("bars where there is no terminal", "models/progress.py", "if not stream.isatty() or ", "if ", ("cli/test_main.py", "models/test_progress.py"), "torch_alone or plain"),
    Mutant("an installation without a kernel keeps its remedy to itself", "kernels/binding.py", "--no-cache-dir ", "", ("kernels/test_native.py",), "without_the_library"),
    Mutant("a wheel for newer systems", "../../packaging/wheel.py", '> NEWEST_GLIBC:', '> NEWEST_GLIBC + 9:', ("repository/test_wheel.py",), "newer_systems"),
    Mutant("a wheel of any size", "../../packaging/wheel.py", "if size > MOST_BYTES:", "if size > 2 * MOST_BYTES:", ("repository/test_wheel.py",), "too_large"),
    Mutant("help that the page of the command line does not have", "bench/command.py", "Width of a head.", "Width of each head.", DOCS),
    Mutant("a picture that is not drawn again", "../../docs/pictures.py", "Mask.prefix(5)", "Mask.prefix(6)", DOCS),
]  # fmt: skip


# Forks a process for each line of arguments of pytest, and prints its status. What takes long to import, and is the same
# with any bug, is imported once. The finder of an editable install would import the original instead of the copy.
SERVER = """
import json, os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, "src")
import pytest, torch._dynamo, transformers.modeling_utils
from hypothesis import Phase, settings
settings.register_profile("found", phases=[Phase.explicit, Phase.generate])  # a failure is not made smaller
settings.load_profile("found")
assert "qkv" not in sys.modules
for line in sys.stdin:
    child = os.fork()
    if not child:
        for output in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        import qkv
        assert os.path.samefile(os.path.dirname(qkv.__file__), "src/qkv"), qkv.__file__
        os._exit(pytest.main(json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Copy:
    """The library in a folder of its own, where one bug at a time is planted.

    Its kernel is compiled for the best instruction set of this machine and the one that all have, and with less
    optimisation, which takes half as long.
    """

    UNCHANGED = "masks.py"
    """The file in which no bug is planted first, to see that the tests pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        _compile_two(folder / "native")
        _optimise_less(folder)
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.times = itertools.count(int(time.time()))

    def survives(self, mutant: Mutant) -> bool:
        """Whether the tests pass with the bug in. A crash is a failure."""
        path = self.folder / "src" / "qkv" / mutant.file
        source = path.read_text()
        assert mutant.right in source, f"{mutant.name}: {mutant.file} does not contain {mutant.right!r}"
        self.write(path, source.replace(mutant.right, mutant.wrong, 1))
        try:
            if mutant.is_native:
                self.compile()
            status = self.test(mutant)
        finally:
            self.write(path, source)
        assert status in (0, 1) or status < 0, f"{mutant.name}: pytest could not run its tests; it exited with {status}"
        return status == 0

    def write(self, path: Path, source: str) -> None:
        """With a time of its own in seconds, by which Python tells whether bytecode is that of another version."""
        path.write_text(source)
        if path.suffix == ".py":
            when = next(self.times)
            os.utime(path, (when, when))

    def compile(self) -> None:
        self.build("-DSKBUILD_STATE=editable")

    def build(self, *settings: str) -> None:
        tools, build = Path(sys.executable).parent, self.folder / "build"
        there = f"-S {self.folder} -B {build} -G Ninja -DCMAKE_MAKE_PROGRAM={tools}/ninja"
        for arguments in ([*there.split(), *settings], ["--build", build]):
            done = subprocess.run([tools / "cmake", *arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

    def test(self, mutant: Mutant) -> int:
        only = mutant.only or ("native" if mutant.tests == KERNEL else "")
        taken = "network or vision" if mutant.tests == BROWSER else "long or network or vision"
        selected = ["-m", f"not ({taken})", *(["-k", only] if only else [])]
        tests = [f"tests/{name}" for name in mutant.tests]
        assert self.server.stdin is not None and self.server.stdout is not None
        how = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        print(json.dumps([*how, *selected, *tests]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())


class EmulatedCopy(Copy):
    """The kernel for aarch64 in a folder of its own, and its own tests under QEMU."""

    UNCHANGED = f"{NATIVE}/sizes.h"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "native", folder / "native")
        for name in ("CMakeLists.txt", "src/qkv/kernels/binding.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        _optimise_less(folder)

    @staticmethod
    def is_possible() -> bool:
        return all(map(shutil.which, ("qemu-aarch64", "aarch64-linux-gnu-g++")))

    def compile(self) -> None:
        self.build("-DQKV_TESTS=ON", f"-DCMAKE_TOOLCHAIN_FILE={self.folder}/native/aarch64.cmake")

    def test(self, mutant: Mutant) -> int:
        under = ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
        program = [
            *under,
            self.folder / "build/native/tests/qkv_tests",
            *(f"{name}:{mutant.only}" for name in mutant.tests),
        ]
        done = subprocess.run(program, env={**os.environ, "QKV_ISA": mutant.needs or ""}, capture_output=True)
        return int(done.returncode != 0)  # a crash as well


def _optimise_less(folder: Path) -> None:
    script = folder / "CMakeLists.txt"
    script.write_text(script.read_text().replace("set(QKV_LEVEL -O3)", f"set(QKV_LEVEL {LEVEL})"))


def _compile_two(native: Path) -> None:
    """Leaves two instruction sets in the list of those to compile, the best one with all that it extends."""
    isas, (best, *_, any_machines) = native / "src/abi/isas.def", kernels.supported_isas()
    # The kernel's own tests ask which instruction sets the best one extends.
    shutil.copy(isas, native / "tests/isas.def")
    asking = native / "tests/call.cpp"
    asking.write_text(asking.read_text().replace('"abi/isas.def"', '"isas.def"'))
    lines = {line[2]: line for line in re.finditer(r'(ISA\w*)\((\w+), (\w+), "(.*)", (.*)\)\n', isas.read_text())}
    extended = [best]
    while extended[-1] != any_machines:
        extended.append(lines[extended[-1]][3])
    flags, present = (sep.join(lines[name][n] for name in extended) for sep, n in ((" ", 4), (" && ", 5)))
    isas.write_text(f'{lines[any_machines][0]}{lines[best][1]}({best}, {any_machines}, "{flags}", {present})\n')


def main() -> int:
    parser = argparse.ArgumentParser(description="Plants one bug after another; the tests must find each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="plant those whose name contains it; all by default")
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=os.cpu_count(), help="copies; by default, as many as cores"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="plant N of them")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if not arguments.names or any(name in m.name for name in arguments.names)]
    if arguments.sample is not None:
        mutants = random.Random(dt.date.today().toordinal()).sample(mutants, min(arguments.sample, len(mutants)))
    has = {None, *kernels.supported_isas(), *(EMULATED if EmulatedCopy.is_possible() else ())}
    for mutant in mutants:
        if mutant.isa not in has:
            print(f"not here  {mutant.name}: its code is for {mutant.isa}")
        elif mutant.tests == BROWSER and not browser.is_here():
            print(f"not here  {mutant.name}: its tests need a browser")
    mutants = [m for m in mutants if m.isa in has and (m.tests != BROWSER or browser.is_here())]
    alive = 0
    for kind in (Copy, EmulatedCopy):
        planted = [mutant for mutant in mutants if mutant.is_emulated == (kind is EmulatedCopy)]
        alive += plant(planted, kind, arguments.jobs) if planted else 0
    return 1 if alive else 0


def plant(mutants: list[Mutant], kind: type[Copy], jobs: int) -> int:
    """Plants one after the other into so many copies; returns how many survive."""
    mutants.sort(key=lambda mutant: mutant.is_native)  # the others run with the kernel as it is
    every_test = tuple({name for mutant in mutants for name in mutant.tests})
    nothing = [Mutant("nothing", kind.UNCHANGED, "", "", every_test, needs=mutants[0].needs)]
    in_browser = [mutant.only for mutant in mutants if mutant.tests == BROWSER]
    if in_browser:  # tests that are long, too
        nothing.append(nothing[0]._replace(tests=BROWSER, only=" or ".join(dict.fromkeys(in_browser))))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for job in range(jobs):
            copies.put(kind(Path(folder) / str(job) / "qkv"))

        def survives(mutant: Mutant) -> bool:
            copied = copies.get()
            try:
                return copied.survives(mutant)
            finally:
                copies.put(copied)

        results = pool.map(survives, [*nothing, *mutants])
        for _ in nothing:
            assert next(results), "the tests fail without a bug"
        alive = 0
        for mutant, survived in zip(mutants, results, strict=True):
            alive += survived
            print(f"{'SURVIVED' if survived else 'found   '}  {mutant.name}", flush=True)
    return alive


if __name__ == "__main__":
    sys.exit(main())
