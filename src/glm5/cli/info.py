"""What `glm5 info` shows: architecture, parameters by part, bytes by dtype. Reads headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glm5.cli import streams
from glm5.config import ModelConfig
from glm5.errors import ConfigError

_PART_NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "indexer": "indexer",
    "dense_mlp": "dense MLP",
    "router": "router",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "norms": "norms",
    "lm_head": "output head",
}


def describe(path: str) -> dict[str, Any]:
    """Facts of a checkpoint directory, a config.json, the embedded model (`nano`) or a preset."""
    from glm5.config.presets import PRESETS
    from glm5.hub import EMBEDDED, resolve

    place = Path(path)
    if not place.exists() and path.lower() in PRESETS:
        config, directory = ModelConfig.preset(path), None
    else:
        if (path == EMBEDDED and not place.exists()) or place.suffix.lower() == ".gguf":
            place = resolve(path)
        if not place.exists():
            raise ConfigError(f"{path}: no such directory, and no preset ({', '.join(sorted(PRESETS))})")
        if place.is_dir() or not place.name.endswith(".json"):
            place = resolve(path)
        config, directory = ModelConfig.from_pretrained(place), place if place.is_dir() else None
    total, active = config.params_by_part(), config.params_by_part(active=True)
    facts: dict[str, Any] = {
        "path": path,
        "model_type": config.model_type,
        "architecture": _architecture(config),
        "parameters": {name: {"total": total[name], "active": active[name]} for name in _PART_NAMES},
        "total": config.total_params(),
        "active": config.active_params(),
        "mtp": config.total_params(mtp=True) - config.total_params(),
    }
    from glm5.disk.shards import INDEX_FILE, SINGLE_FILE, ShardIndex

    if directory is not None and any((directory / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        index = ShardIndex(directory)
        facts["tensors"] = len(index.names)
        facts["bytes"] = index.bytes_by_dtype()
    return facts


def _architecture(config: ModelConfig) -> dict[str, str]:
    layers = (
        f"{config.num_hidden_layers} ({config.num_dense_layers} dense, {config.num_sparse_layers} sparse)"
    )
    facts = {
        "layers": layers,
        "hidden size": f"{config.hidden_size:,}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    if config.uses_mla:
        facts["attention"] = (
            f"MLA, {config.num_attention_heads} heads, latent {config.kv_lora_rank}+{config.qk_rope_head_dim}"
        )
    else:
        facts["attention"] = (
            f"GQA, {config.num_attention_heads} query and {config.num_key_value_heads} key heads"
        )
    if config.uses_dsa:
        full = sum(kind == "full" for kind in config.indexer_types or ())
        facts["sparse attention"] = f"DSA, top {config.index_topk:,} tokens, {full} indexers"
    if config.attention_mask_type != "causal":
        facts["mask"] = config.attention_mask_type
    if config.num_sparse_layers:
        facts["experts"] = (
            f"{config.n_routed_experts}, {config.num_experts_per_tok} a token, "
            f"{config.n_shared_experts} shared, width {config.moe_intermediate_size:,}"
        )
    facts["MTP layers"] = str(config.num_nextn_predict_layers)
    return facts


def print_description(facts: dict[str, Any]) -> None:
    """Tables that fit 80 columns."""
    from rich.markup import escape
    from rich.table import Table

    console = streams.console()
    console.print(f"[bold]{escape(str(facts['path']))}[/]  {facts['model_type']}", soft_wrap=True)
    shape = Table.grid(padding=(0, 2))
    for name, value in facts["architecture"].items():
        shape.add_row(f"  {name}", value)
    console.print(shape)
    console.print()
    table = Table(box=None, padding=(0, 2))
    table.add_column("parameters")
    for column in ("total", "active a token", "share"):
        table.add_column(column, justify="right")
    for name, count in facts["parameters"].items():
        if count["total"] or count["active"]:
            share = f"{count['total'] / facts['total']:.1%}"
            table.add_row(_PART_NAMES[name], f"{count['total']:,}", f"{count['active']:,}", share)
    ratio = f"{facts['active'] / facts['total']:.1%} active"
    table.add_row("[bold]all[/]", f"[bold]{facts['total']:,}[/]", f"[bold]{facts['active']:,}[/]", ratio)
    console.print(table)
    if facts["mtp"]:
        console.print(f"\nand {facts['mtp']:,} in the MTP layer, which drafts tokens")
    if "bytes" in facts:
        stored = ", ".join(f"{name} {_size(count)}" for name, count in facts["bytes"].items())
        console.print(f"\n{facts['tensors']:,} tensors, {_size(sum(facts['bytes'].values()))}: {stored}")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"
