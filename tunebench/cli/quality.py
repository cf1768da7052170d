"""What a model makes of words: `quality` of its schemes, and `generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tunebench import stopping
from tunebench.cli import benching, inputs
from tunebench.cli.inputs import console
from tunebench.errors import NOT_TEXT, TuneBenchError

if TYPE_CHECKING:
    from tunebench.bench.quality import Judge
    from tunebench.model.workload import Model
    from tunebench.results import Quality
    from tunebench.tuning.session import Lowered

COLUMNS = ("scheme", "bits", "weights", "perplexity", "KL, nats", "same top", "decode")
NOTE = """Float32: perplexity {:.4g}. Of {} tokens of {}, with {}s. decode is the perplexity of the last of them one
at a time, in brackets in chunks. Rows are in {}.""".replace("\n", " ")

Models = Annotated[list[str], typer.Option("--model", "-m", help="A folder or .gguf with weights and tokenizer.")]
Schemes = Annotated[list[str], typer.Option("--scheme", "-q", help="As for bench; repeat for several.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="Plain text in UTF-8; one of TuneBench's own without.")]
Tokens = Annotated[int, typer.Option(min=1, max=1 << 20, help="Of the text's tokens, at most so many.")]
Target = Annotated[str, typer.Option("--target", help="What runs it; `list targets`.")]
Threads = Annotated[int, typer.Option(min=0, max=1 << 12, help="CPU threads of a kernel; 0: all cores.")]
Context = Annotated[int, typer.Option(min=16, max=1 << 20, help="Positions of the KV cache.")]
Weights = Annotated[str, typer.Option(help="A folder or .gguf of weights and tokenizer; the model's own without.")]
WorkDir = Annotated[Path, typer.Option(help="Where databases and reports go.")]
MOST_TOKENS = 4096


def quality_command(
    model: Models,
    scheme: Schemes = [],  # noqa: B006
    text: TextFile = None,
    tokens: Tokens = MOST_TOKENS,
    target: Target = "llvm",
    threads: Threads = 0,
    context: Context = 2048,
    weights: Weights = "",
    work_dir: WorkDir = Path("tunebench-work"),
    name: Annotated[str, typer.Option(help="The report's folder in WORK_DIR/reports.")] = "local",
    label: Annotated[str, typer.Option(help="What reports call this run.")] = "",
) -> None:
    """Compare what a model in each scheme predicts of a text with what its float32 weights predict."""
    found = inputs.workloads(model, scheme, 1, "", context)
    judge = make_judge(text, tokens, weights)
    session = inputs.open_session(target, threads, work_dir, name, run_name=label)
    inputs.make_folder(session.results_path.parent)
    from tunebench import results
    from tunebench.bench.runner import quality_row
    from tunebench.report.words import INTERVAL

    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    with stopping.keeping(f"Rows so far are in {session.results_path}."):
        for workload in found:
            lowered = benching.lowered(session, workload, held=True)
            judged = judge_of(judge, lowered)
            results.append(session.results_path, quality_row(lowered, judged))
            table.add_row(*_cells(lowered.model, judged))
    console.print(table)
    of = (judged.reference_perplexity, judged.tokens, judged.text, INTERVAL, session.results_path)
    console.print(NOTE.format(*of), soft_wrap=True)


def make_judge(text: Path | None, tokens: int, weights: str) -> Judge:
    """What gives schemes their quality by a text, or by the one that TuneBench comes with."""
    from tunebench.bench.quality import PROSE, Judge, read_text

    return Judge(read_text(text or PROSE), weights, tokens)


def judge_of(judge: Judge, lowered: Lowered) -> Quality:
    """The quality of a model in a scheme, while the terminal says how far it is."""
    title = f"{lowered.model.name} {lowered.model.workload.scheme.name}"
    with inputs.status(title) as status:
        return judge.quality(lowered, lambda words: status.update(f"{title}: {words}"))


def _cells(model: Model, judged: Quality) -> tuple[str, ...]:
    from tunebench.model import quantization
    from tunebench.report import quality, words

    scheme = model.workload.scheme
    perplexity, _, *others = quality.cells(judged)
    bits = f"{quantization.stored_bits(scheme.weight):g}"
    return (scheme.name, bits, words.size(model.weight_bytes), perplexity, *others)


def generate_command(
    model: Annotated[str, typer.Option("--model", "-m", help="A folder or .gguf with weights and tokenizer.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to go on with, as it is: no chat template is applied.")],
    scheme: Annotated[str, typer.Option("--scheme", "-q", help="As for bench.")] = "",
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", min=1, max=1 << 20, help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 2, help="Of what is drawn at a temperature.")] = 0,
    target: Target = "llvm",
    threads: Threads = 0,
    context: Context = 2048,
    weights: Weights = "",
    work_dir: WorkDir = Path("tunebench-work"),
) -> None:
    """Go on with a text: tokens as they come, then the speed. Plain completion, without a chat template."""
    (workload,) = inputs.workloads([model], [scheme] if scheme else [], 1, "", context)
    session = inputs.open_session(target, threads, work_dir, "local")
    from tunebench.bench.generate import generate
    from tunebench.bench.ready import known, load_ready, real_weights
    from tunebench.model import tokenizer

    lowered = benching.lowered(session, workload, held=True)
    checkpoint = real_weights(lowered.model, weights)
    words = checkpoint.tokenizer()
    before, tokens = tokenizer.encode(words, prompt, lowered.model.config.vocab_size)
    tokens = before + tokens
    if len(tokens) + n_gen > context:
        raise TuneBenchError(f"{len(tokens)} tokens and {n_gen} more do not fit.", "Raise --context, or lower -n.")
    with inputs.status("compile and load"):
        engine = load_ready(lowered, known(lowered).records, weights)
    written = tokenizer.Written(words)
    times_s = [time.monotonic()]
    for token in generate(engine, tokens, n_gen, temperature, seed, tokenizer.end_tokens(checkpoint)):
        times_s.append(time.monotonic())
        sys.stdout.write(NOT_TEXT.sub("", written.add(token)))
        sys.stdout.flush()
    print(flush=True)
    print(_speed(len(tokens), times_s), file=sys.stderr)


def _speed(n_prompt: int, times_s: list[float]) -> str:
    """Of a prompt and what came after it, from the times at its start and at each token."""
    if len(times_s) < 2:
        return "The model said that the text ends there."
    first = (
        f"{n_prompt} tokens of prompt, {len(times_s) - 1} generated: first one after {times_s[1] - times_s[0]:.3g} s"
    )
    rest_s = times_s[-1] - times_s[1]
    return f"{first}, then {(len(times_s) - 2) / rest_s:.1f} tokens/s" if rest_s > 0 else first
