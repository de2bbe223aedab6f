"""How much does int4 change a model's answers, beside llama.cpp's Q4_K_M?

    python benchmarks/kl.py --model DIR --llama-bin DIR [--quick] [--heldout DIR] [--threads N]

One model, one held-out text, one judge: every rounding is written as a GGUF, and llama.cpp's
`llama-perplexity` compares its answers with the source's. The model has to be a glm4_moe (both can load it)
whose widths are multiples of 256 (Q4_K's rows), for example what `glm5 train` makes of a recipe with such
widths. llama.cpp's files are judged twice: dequantized to fp32, as ours are, so that only the weights
differ, and as llama.cpp computes from them. First the weights of the layers alone, with embeddings and head
as in the source; then each side's defaults. The held-out text is English, Chinese and code in equal parts
from `data/corpus/heldout` (docs/training.md says how it is made); `--calibration` gives gptq and imatrix
another text than the shipped one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from glm5.checkpoint.gguf import names
from glm5.config import ModelConfig
from glm5.disk.shards import ShardIndex
from glm5.errors import Glm5Error
from glm5.formats.packing import dequantize
from glm5.quantize import Calibration, Recipe, quantize
from glm5.quantize.calibration import DEFAULT_TOKENS, read_texts, shipped_text
from glm5.quantize.plan import Item, plan
from glm5.quantize.sources import DirectorySource
from glm5.text.tokenizer import TOKENIZER_FILE, Tokenizer

PROGRAMS = ("llama-quantize", "llama-perplexity", "llama-imatrix")
LANGUAGES = ("en", "zh", "code")
CONTEXT = 256
# Of one document no more than this many tokens, so that no book fills a language's part.
DOCUMENT_TOKENS = 4096
# GGUF's numbers for what a token is.
NORMAL, CONTROL = 1, 3
# Its errors go through every later layer. 8 bits here take less than groups of 128 save on groups of 64.
FIRST_LAYER = (("model.layers.0.self_attn.*", 8), ("model.layers.0.mlp.down_proj", 8))
# Embeddings and head as in the source: only the layers' matrices are compared.
LAYERS_ONLY = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")


@dataclass(frozen=True)
class Verdict:
    """What llama-perplexity says of a file: mean KL to the source and its standard error (nats), share of
    positions with the same best token, perplexity."""

    kl: float
    error: float
    same_top: float
    perplexity: float


@dataclass
class Row:
    """A line of the table. bits: of the layers' matrices and of all weights, where they are of interest."""

    name: str
    verdict: Verdict
    bits: float | None = None
    bits_of_all: float | None = None


@dataclass
class Rows:
    console: Console
    found: list[Row] = field(default_factory=list)

    def add(self, *row: Any) -> None:
        self.found.append(Row(*row))
        self.console.print(f"{row[0]}: KL {row[1].kl:.5f}", style="dim")

    def kl(self, name: str) -> float:
        return next(row.verdict.kl for row in self.found if row.name == name)


def main() -> None:
    options = arguments()
    missing = [name for name in PROGRAMS if not (options.llama_bin / name).is_file()]
    if missing:
        refuse(
            f"{options.llama_bin}: has no {', '.join(missing)}; build llama.cpp and name its bin directory"
        )
    torch.set_num_threads(options.threads)
    console = Console(highlight=False, stderr=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows, scored = measure(options, Path(folder), Rows(console))
    except Glm5Error as error:
        refuse(str(error))
    show(Console(highlight=False, width=100), rows, scored)


def measure(options: argparse.Namespace, folder: Path, rows: Rows) -> tuple[Rows, int]:
    """Every row, and how many positions each was judged on."""
    model = Source(options.model)
    texts = read_texts(options.calibration) if options.calibration else [shipped_text()]
    calibration = Calibration.from_texts(model.tokenizer, texts, options.calibration_tokens)
    (folder / "calibration.txt").write_text("\n\n".join(texts), encoding="utf-8")
    heldout = folder / "heldout.txt"
    heldout.write_text(heldout_text(options.heldout, model.tokenizer, options.tokens), encoding="utf-8")
    source = folder / "source.gguf"
    model.write(source)
    llama = Llama(options.llama_bin, options.threads, source, heldout)

    rows.add("source", llama.judge(source))

    def peer(name: str, kind: str, *arguments: str) -> None:
        path, floats = folder / "peer.gguf", folder / "floats.gguf"
        llama.quantize(source, path, kind, *arguments, *LAYERS_ONLY)
        llama.quantize(path, floats, "F32", "--allow-requantize")
        bits, _ = model.bits_in(path)
        rows.add(name, llama.judge(floats), bits)
        if kind == "Q4_K_M":
            rows.add(f"{name}, as run", llama.judge(path), bits)

    def peer_by_default(name: str, *arguments: str) -> None:
        path = folder / "peer.gguf"
        llama.quantize(source, path, "Q4_K_M", *arguments)
        rows.add(name, llama.judge(path), *model.bits_in(path))

    def ours(name: str, recipe: Recipe, calibration: Calibration | None = None) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as result:
            quantize(options.model, result, recipe, calibration=calibration)
            path = folder / "ours.gguf"
            model.write(path, packed_reader(Path(result)))
            rows.add(name, llama.judge(path), *model.bits_of(recipe))

    peer("q4_k_m", "Q4_K_M")
    ours("nearest g64", Recipe(4, 64))
    ours("gptq g64", Recipe(4, 64), calibration)
    if options.quick:
        return rows, llama.scored
    ours("nearest g128", Recipe(4, 128))
    ours("gptq g128", Recipe(4, 128), calibration)
    ours("gptq g128, first layer 8", Recipe(4, 128, FIRST_LAYER), calibration)
    ours("gptq g128, attention 8", Recipe(4, 128, (("*.self_attn.*", 8),)), calibration)
    llama.imatrix(folder / "calibration.txt", folder / "imatrix.gguf")
    with_imatrix = ("--imatrix", str(folder / "imatrix.gguf"))
    peer("q4_k_m imatrix", "Q4_K_M", *with_imatrix)
    peer("q4_0", "Q4_0")
    # By default ours leaves embeddings and head alone, so that the rows above are its defaults.
    peer_by_default("q4_k_m, defaults")
    peer_by_default("q4_k_m imatrix, defaults", *with_imatrix)
    ours("gptq g64, head 8", Recipe(4, 64, (("lm_head", 8),)), calibration)
    return rows, llama.scored


class Source:
    """The model in its directory: its weights by GGUF name, its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.weights = DirectorySource(directory)
        self.config: ModelConfig = self.weights.config
        if self.config.model_type != "glm4_moe" or self.config.num_nextn_predict_layers:
            refuse(f"{directory}: is no glm4_moe without MTP layers; only of those a GGUF is written here")
        self.items = plan(self.weights, Recipe(group=32))
        self.rounded = [item for item in self.items if item.scheme]
        for item in self.rounded:
            if item.shape[1] % 256:
                refuse(f"{directory}: {item.name} is {item.shape[1]} wide; Q4_K needs multiples of 256")
        if not (directory / TOKENIZER_FILE).is_file():
            refuse(f"{directory}: has no {TOKENIZER_FILE}, so no text can be read")
        self.vocabulary = json.loads((directory / TOKENIZER_FILE).read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_pretrained(directory)

    def write(self, path: Path, read: Callable[[str], Tensor] | None = None) -> None:
        """A GGUF in fp32 of these weights, or of what `read` says they have become."""
        import gguf

        writer = gguf.GGUFWriter(path, "glm4moe")
        write_metadata(writer, self.config)
        write_vocabulary(writer, self.vocabulary, self.config, self.tokenizer)
        banks: dict[str, list[Tensor]] = {}
        for item in self.items:
            values = (read or self.weights.read)(item.name).float()
            found = names.source(item.name, self.config, ())
            if found.expert is None:
                writer.add_tensor(found.tensor, values.numpy())
                continue
            bank = banks.setdefault(found.tensor, [])
            bank.append(values)
            if len(bank) == self.config.n_routed_experts:
                writer.add_tensor(found.tensor, torch.stack(banks.pop(found.tensor)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def bits_of(self, recipe: Recipe) -> tuple[float, float]:
        """Bits a weight of the layers' matrices, and a weight of all; what stays counts 16."""
        items = plan(self.weights, recipe)
        layers = {item.name for item in self.rounded}
        bits = {item.name: stored_bits(item) for item in items}
        return (
            sum(bits[name] for name in layers) / sum(math.prod(item.shape) for item in self.rounded),
            sum(bits.values()) / sum(math.prod(item.shape) for item in items),
        )

    def bits_in(self, path: Path) -> tuple[float, float]:
        """The same of a GGUF, in which fp32 is what stays."""
        import gguf

        layers = {names.source(item.name, self.config, ()).tensor for item in self.rounded}
        every: list[tuple[float, int]] = []
        matrices: list[tuple[float, int]] = []
        for tensor in gguf.GGUFReader(path).tensors:
            count, size = int(tensor.n_elements), 8.0 * int(tensor.n_bytes)
            size = 16.0 * count if tensor.tensor_type == gguf.GGMLQuantizationType.F32 else size
            every.append((size, count))
            if tensor.name in layers:
                matrices.append((size, count))
        in_layers, of_all = (sum(b for b, _ in part) / sum(n for _, n in part) for part in (matrices, every))
        return in_layers, of_all


def stored_bits(item: Item) -> float:
    scheme = item.scheme
    return math.prod(item.shape) * (scheme.bits + 16 / scheme.group if scheme else 16)


def packed_reader(directory: Path) -> Callable[[str], Tensor]:
    """Weights of a checkpoint of ours in fp32: code times scale, rounded no further."""
    index = ShardIndex(directory)

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        if packed not in index:
            return index.file(name).read(name)
        words, scales = index.file(packed).read(packed), index.file(scale).read(scale)
        columns = int(index.file(f"{module}.weight_shape").read(f"{module}.weight_shape")[1])
        return dequantize(words, scales, words.shape[1] * 32 // columns, columns)

    return read


def write_metadata(writer: Any, config: ModelConfig) -> None:
    head = config.attention_head_dim
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": int(head * config.partial_rotary_factor),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": 2,  # sigmoid
        "leading_dense_block_count": config.first_k_dense_replace,
        "vocab_size": config.vocab_size,
    }
    for name, number in numbers.items():
        writer.add_uint32(f"glm4moe.{name}", number)
    writer.add_float32("glm4moe.rope.freq_base", config.rope_theta)
    writer.add_float32("glm4moe.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("glm4moe.expert_weights_scale", config.routed_scaling_factor)
    writer.add_bool("glm4moe.expert_weights_norm", config.norm_topk_prob)


def write_vocabulary(writer: Any, files: dict[str, Any], config: ModelConfig, tokenizer: Tokenizer) -> None:
    """A byte-level BPE as llama.cpp stores it. Every window begins with [gMASK], as the model's texts do."""
    tokens = {number: text for text, number in files["model"]["vocab"].items()}
    control = {entry["id"]: entry["content"] for entry in files["added_tokens"]}
    ids = range(config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in files["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list([control.get(i) or tokens.get(i) or f"[PAD{i}]" for i in ids])
    writer.add_token_types([NORMAL if i in tokens and i not in control else CONTROL for i in ids])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_ids[0])
    writer.add_bos_token_id(tokenizer.control_ids.get("[gMASK]", tokenizer.eos_token_ids[0]))
    writer.add_add_bos_token(True)


class Llama:
    """llama.cpp's programs. The judge knows the source's answers to the held-out text."""

    def __init__(self, programs: Path, threads: int, source: Path, heldout: Path) -> None:
        self.programs, self.threads = programs, ["-t", str(threads)]
        self.source, self.base = source, source.with_suffix(".logits")
        # Eight windows to a batch.
        self.text = ["-f", str(heldout), "-c", str(CONTEXT), "-b", str(8 * CONTEXT), "--no-escape"]
        said = self.run("llama-perplexity", "-m", source, *self.text, "--kl-divergence-base", self.base)
        windows = re.search(r"over (\d+) chunks", said)
        self.scored = int(windows[1]) * (CONTEXT - 1 - CONTEXT // 2) if windows else 0

    def judge(self, path: Path) -> Verdict:
        against = ["--kl-divergence-base", str(self.base), "--kl-divergence"]
        patterns = (
            r"Mean\s+KLD:\s+(\S+)",
            r"Mean\s+KLD:.*±\s+(\S+)",
            r"Same top p:\s+(\S+)",
            r"PPL\(Q\)\s+:\s+(\S+)",
        )
        said = ""
        for _ in range(3):  # on a busy machine it may end before its last lines are out
            said = self.run("llama-perplexity", "-m", path, *self.text, *against)
            found = [re.search(pattern, said) for pattern in patterns]
            kl, error, top, perplexity = (float(match[1]) if match else math.nan for match in found)
            if all(found):
                return Verdict(kl, error, top / 100, perplexity)
        refuse(f"llama-perplexity says no mean KLD of {path.name}: {last_line(said)}")

    def quantize(self, source: Path, target: Path, kind: str, *options: str) -> None:
        self.run("llama-quantize", *options, source, target, kind, self.threads[1], threads=False)

    def imatrix(self, text: Path, target: Path) -> None:
        self.run("llama-imatrix", "-m", self.source, "-f", text, "-o", target, "-c", "512", "--no-ppl")

    def run(self, name: str, *arguments: str | Path, threads: bool = True) -> str:
        command = [str(self.programs / name), *map(str, arguments), *(self.threads if threads else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = done.stdout.decode("utf-8", "replace")
        if done.returncode:
            refuse(f"{name}: {last_line(said)}")
        return said


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def heldout_text(corpus: Path, tokenizer: Tokenizer, tokens: int) -> str:
    """About `tokens` tokens of each language, from documents in an order that is always the same."""
    documents: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for file in sorted(corpus.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            documents.get(row["language"], []).append(row["text"])
    parts = []
    for language, texts in documents.items():
        random.Random(language).shuffle(texts)
        part: list[int] = []
        for text in texts:
            part += tokenizer.encode(text + "\n\n")[: min(DOCUMENT_TOKENS, tokens - len(part))]
        if len(part) < tokens:
            refuse(
                f"{corpus}: has {len(part)} tokens of {language}, {tokens} are needed; see docs/training.md"
            )
        parts.append(tokenizer.decode(part))
    return "\n\n".join(parts)


def show(console: Console, rows: Rows, scored: int) -> None:
    table = Table(box=None, padding=(0, 1))
    for heading in ("", "KL, nats", "±", "same top", "perplexity", "layers", "all"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows.found:
        verdict = row.verdict
        bits = [f"{value:.3f}" if value else "" for value in (row.bits, row.bits_of_all)]
        table.add_row(
            row.name, f"{verdict.kl:.5f}", f"{verdict.error:.5f}", f"{verdict.same_top:.2%}",
            f"{verdict.perplexity:.3f}", *bits,
        )  # fmt: skip
    console.print(table)
    console.print(f"KL(source || result), {scored} positions in windows of {CONTEXT}, by llama-perplexity")
    console.print(
        "layers, all: bits a weight of the layers' matrices, of all (what is not rounded counts 16)"
    )
    report = {
        "kl": {row.name: abs(row.verdict.kl) for row in rows.found},
        "same_top": {row.name: round(row.verdict.same_top, 5) for row in rows.found},
        "bits": {row.name: round(row.bits, 4) for row in rows.found if row.bits},
        "gptq64_vs_q4_k_m": round(rows.kl("gptq g64") / rows.kl("q4_k_m"), 4),
    }
    print(json.dumps(report))


def refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--llama-bin", type=Path, required=True, help="the directory of llama-perplexity")
    parser.add_argument("--heldout", type=Path, default=Path("data/corpus/heldout"))
    parser.add_argument("--tokens", type=int, help="of the held-out text in each language")
    parser.add_argument("--calibration", type=Path, action="append", metavar="FILE.txt")
    parser.add_argument("--calibration-tokens", type=int, default=DEFAULT_TOKENS)
    parser.add_argument("--quick", action="store_true", help="a short text, Q4_K_M and group 64 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.tokens = options.tokens or (4096 if options.quick else 20480)
    return options


if __name__ == "__main__":
    main()
