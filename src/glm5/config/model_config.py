"""`ModelConfig`: the shape of a GLM model, with the key names of Hugging Face `config.json`.

Knows the three published types (`glm_moe_dsa`, `glm4_moe`, `glm4_moe_lite`), their presets and
their parameter counts. Holds no tensors and imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glm5.config.checks import check, check_depth
from glm5.disk.files import write_atomic
from glm5.disk.json_file import read_json
from glm5.errors import ConfigError

MODEL_TYPES = ("glm_moe_dsa", "glm4_moe", "glm4_moe_lite")
ARCHITECTURES = {
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}

# Switches that some writers put down as null for "as usual"; a width or a number of layers is never meant so.
_MAY_BE_NULL = (
    "attention_bias", "attention_dropout", "initializer_range", "use_qk_norm", "rope_theta",
    "partial_rotary_factor", "rope_interleave", "indexer_rope_interleave", "n_group", "topk_group",
    "norm_topk_prob",
)  # fmt: skip
_ALIASES = {
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}
# What a published config may leave out, by type (the defaults of transformers 5.24).
_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {},
    "glm4_moe": {
        "q_lora_rank": None,
        "kv_lora_rank": None,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "index_topk": None,
    },
    "glm4_moe_lite": {
        "index_topk": None,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
    },
}


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one model. All sizes are in elements, all names those of Hugging Face.

    Build it from a mapping with `from_dict`, from a directory with `from_pretrained`, or take a
    published size with `preset`. Unknown keys are kept in `extra` and written back.

    Raises:
        ConfigError: a key is missing or impossible; the message names it.
    """

    model_type: str = "glm_moe_dsa"
    vocab_size: int = 154880
    hidden_size: int = 6144
    intermediate_size: int = 12288
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 78
    num_attention_heads: int = 64
    num_key_value_heads: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 202752
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    rope_theta: float = 1_000_000.0

    # Multi-head latent attention (glm_moe_dsa, glm4_moe_lite)
    q_lora_rank: int | None = 2048
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int = 192
    qk_rope_head_dim: int = 64
    v_head_dim: int = 256
    rope_interleave: bool = True
    # eps of q_a_layernorm and kv_a_layernorm; None = rms_norm_eps (vLLM, SGLang). transformers
    # always uses 1e-6, so set it to that when comparing with it.
    latent_norm_eps: float | None = None

    # Grouped-query attention (glm4_moe)
    head_dim: int | None = None
    partial_rotary_factor: float = 1.0
    use_qk_norm: bool = False

    # DSA indexer (glm_moe_dsa); index_topk None = no indexer
    index_topk: int | None = 2048
    index_n_heads: int = 32
    index_head_dim: int = 128
    indexer_rope_interleave: bool = True
    indexer_types: tuple[str, ...] | None = None

    # Mixture of experts
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    mlp_layer_types: tuple[str, ...] | None = None

    # Multi-token prediction
    num_nextn_predict_layers: int = 0
    index_share_for_mtp_iteration: bool = False

    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    dtype: str | None = None

    # Ours: "causal" (as published) or "prefix" (bidirectional over the prompt, causal after it).
    attention_mask_type: str = "causal"

    extra: Mapping[str, Any] = field(default_factory=dict)

    # ---------------------------------------------------------------- construction

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
            )
        check_depth(self)  # before any list of that length is made
        if self.index_topk is not None and self.indexer_types is None:
            object.__setattr__(self, "indexer_types", _indexer_schedule(self))
        if self.mlp_layer_types is None:
            dense = min(self.first_k_dense_replace, self.num_hidden_layers)
            kinds = ("dense",) * dense + ("sparse",) * (self.num_hidden_layers - dense)
            object.__setattr__(self, "mlp_layer_types", kinds)
        check(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read the keys of a `config.json`; aliases are resolved, unknown keys go to `extra`."""
        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError("config.json has no model_type; expected one of " + ", ".join(MODEL_TYPES))
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; use one of {', '.join(MODEL_TYPES)}"
            )
        known = {f.name: f for f in fields(cls) if f.name != "extra"}
        values: dict[str, Any] = dict(_TYPE_DEFAULTS[model_type])
        extra: dict[str, Any] = {}
        for key, value in raw.items():
            name = _ALIASES.get(key, key)
            if name in ("qk_head_dim", "rope_parameters"):
                extra[key] = value
            elif name == "head_dim" and model_type != "glm4_moe":
                # Releases disagree on this key (64 or 192) and it is neither width.
                extra[key] = value
            elif key == "layer_types" and model_type == "glm_moe_dsa":
                continue  # re-saved configs repeat the depth in it; every reader derives it anew
            elif name in known:
                if name != key and name in raw:
                    continue  # both the alias and the real key: the real key counts
                if value is None and name in _MAY_BE_NULL:
                    continue  # null is how some writers leave a key out
                values[name] = _typed(name, known[name].type, value)
            else:
                extra[key] = value
        values.update(_rope_values(raw))
        return cls(**values, extra=extra)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> ModelConfig:
        """Read `config.json` of a checkpoint directory (or the file itself)."""
        path = Path(directory)
        if path.is_dir():
            path = path / "config.json"
        raw = read_json(path, error=ConfigError)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A published size by name, e.g. `glm-5`, `glm-5.2`, `glm-4.5-air`, `glm-4.7-flash`."""
        from glm5.config.presets import PRESETS

        try:
            return cls.from_dict(PRESETS[name.lower()])
        except KeyError:
            raise ConfigError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}") from None

    def with_changes(self, **changes: Any) -> ModelConfig:
        """A copy with other values; derived per-layer lists are made anew unless given."""
        if "num_hidden_layers" in changes or "first_k_dense_replace" in changes:
            changes.setdefault("mlp_layer_types", None)
            changes.setdefault("indexer_types", None)
        return replace(self, **changes)

    # ---------------------------------------------------------------- writing

    def to_dict(self) -> dict[str, Any]:
        """The mapping to write as `config.json`, loadable by `transformers`, vLLM and llama.cpp."""
        out: dict[str, Any] = dict(self.extra)
        skip = {"extra", "rope_theta", "partial_rotary_factor", "head_dim"}
        mla_only = {
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "rope_interleave",
        }
        dsa_only = {
            "index_topk",
            "index_n_heads",
            "index_head_dim",
            "indexer_rope_interleave",
            "indexer_types",
            "index_share_for_mtp_iteration",
        }
        for f in fields(self):
            if f.name in skip or (f.name in mla_only and not self.uses_mla):
                continue
            if f.name in dsa_only and not self.uses_dsa:
                continue
            if f.name == "use_qk_norm" and self.uses_mla:
                continue
            value = getattr(self, f.name)
            if f.name in ("latent_norm_eps", "dtype", "bos_token_id") and value is None:
                continue
            if f.name == "attention_mask_type" and value == "causal":
                continue
            if f.name == "mlp_layer_types" and self.model_type == "glm4_moe":
                continue  # transformers' Glm4MoeConfig reads first_k_dense_replace only
            out[f.name] = list(value) if isinstance(value, tuple) else value
        # Older readers take theta from the top level, newer ones from rope_parameters only.
        rope = dict(out.get("rope_parameters") or {})
        rope.update(rope_type="default", rope_theta=self.rope_theta)
        if not self.uses_mla:
            rope["partial_rotary_factor"] = self.partial_rotary_factor
            out["partial_rotary_factor"] = self.partial_rotary_factor
            out["head_dim"] = self.attention_head_dim
        if self.model_type == "glm_moe_dsa" and self.index_topk is None:
            out["index_topk"] = None  # left out, it would be read as the default
        out["rope_parameters"] = rope
        out["rope_theta"] = self.rope_theta
        out["architectures"] = [ARCHITECTURES[self.model_type]]
        # Other readers (mlx-lm, llama.cpp) need these four spelled out.
        out["first_k_dense_replace"] = self.num_dense_layers
        out["topk_method"] = "noaux_tc"
        out["scoring_func"] = "sigmoid"
        out["moe_layer_freq"] = 1
        return out

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into `directory`, atomically."""
        write_atomic(
            Path(directory) / "config.json", json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        )

    # ---------------------------------------------------------------- derived facts

    @property
    def uses_mla(self) -> bool:
        return self.model_type != "glm4_moe"

    @property
    def uses_dsa(self) -> bool:
        return self.model_type == "glm_moe_dsa" and self.index_topk is not None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_head_dim(self) -> int:
        """Width of one head's query: qk_head_dim in MLA, head_dim in GQA."""
        if self.uses_mla:
            return self.qk_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        if self.uses_mla:
            return self.qk_rope_head_dim
        return int(self.attention_head_dim * self.partial_rotary_factor)

    @property
    def norm_eps_of_latents(self) -> float:
        return self.rms_norm_eps if self.latent_norm_eps is None else self.latent_norm_eps

    @cached_property
    def num_dense_layers(self) -> int:
        """Leading dense layers (what `first_k_dense_replace` means)."""
        kinds = self.mlp_layer_types or ()
        return next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))

    @property
    def num_sparse_layers(self) -> int:
        return sum(kind == "sparse" for kind in self.mlp_layer_types or ())

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` has experts; the MTP layers, past the last one, always do."""
        kinds = self.mlp_layer_types or ()
        return layer >= len(kinds) or kinds[layer] == "sparse"

    def has_indexer(self, layer: int) -> bool:
        """Whether layer `layer` owns indexer weights ("full"); MTP layers always do."""
        if not self.uses_dsa:
            return False
        kinds = self.indexer_types or ()
        return layer >= len(kinds) or kinds[layer] == "full"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    # ---------------------------------------------------------------- parameter counts

    def params_by_part(self, *, active: bool = False, mtp: bool = False) -> dict[str, int]:
        """Weights by part of the network: the whole model, or what one token passes through.

        Active counts the matrices a token is multiplied with: `num_experts_per_tok` routed
        experts instead of all, no embedding row (a look-up) and no norms. The fp32 router
        biases, which are buffers, are counted nowhere.
        """
        layers = self.num_hidden_layers
        h = self.hidden_size
        parts = dict.fromkeys(
            (
                "embedding",
                "attention",
                "indexer",
                "dense_mlp",
                "router",
                "routed_experts",
                "shared_experts",
                "norms",
                "lm_head",
                "mtp_projection",
            ),
            0,
        )
        count_layers = list(range(layers))
        if mtp:
            count_layers += [layers + i for i in range(self.num_nextn_predict_layers)]
            parts["mtp_projection"] = self.num_nextn_predict_layers * 2 * h * h
            parts["norms"] += self.num_nextn_predict_layers * 3 * h  # enorm, hnorm, shared_head.norm
        experts = self.num_experts_per_tok if active else self.n_routed_experts
        for layer in count_layers:
            weights, norms = self._attention_params()
            parts["attention"] += weights
            parts["norms"] += norms + 2 * h
            if self.has_indexer(layer):
                parts["indexer"] += self._indexer_params()
                parts["norms"] += 2 * self.index_head_dim
            if self.is_sparse(layer):
                parts["router"] += self.n_routed_experts * h
                parts["routed_experts"] += experts * 3 * h * self.moe_intermediate_size
                parts["shared_experts"] += self.n_shared_experts * 3 * h * self.moe_intermediate_size
            else:
                parts["dense_mlp"] += 3 * h * self.intermediate_size
        parts["norms"] = 0 if active else parts["norms"] + h
        parts["embedding"] = 0 if active else self.vocab_size * h
        # A tied head is one matrix: count it where it is used.
        tied_again = self.tie_word_embeddings and not active
        parts["lm_head"] = 0 if tied_again else self.vocab_size * h
        return parts

    def total_params(self, *, mtp: bool = False) -> int:
        """All weights; `mtp=True` adds the multi-token-prediction layer ("744B" is without)."""
        return sum(self.params_by_part(mtp=mtp).values())

    def active_params(self, *, mtp: bool = False) -> int:
        """Weights one token is multiplied with, output head included ("40B")."""
        return sum(self.params_by_part(active=True, mtp=mtp).values())

    def _attention_params(self) -> tuple[int, int]:
        """(matrix weights and biases, norm weights) of one layer's attention."""
        h, heads = self.hidden_size, self.num_attention_heads
        if not self.uses_mla:
            d, kv = self.attention_head_dim, self.num_key_value_heads
            weights = h * d * (heads + 2 * kv) + heads * d * h
            if self.attention_bias:
                weights += d * (heads + 2 * kv)
            return weights, 2 * d if self.use_qk_norm else 0
        assert self.kv_lora_rank is not None
        latent, norms = self.kv_lora_rank, self.kv_lora_rank
        weights = h * (latent + self.qk_rope_head_dim)
        weights += latent * heads * (self.qk_nope_head_dim + self.v_head_dim)
        weights += heads * self.v_head_dim * h
        if self.attention_bias:
            weights += latent + self.qk_rope_head_dim + h + (self.q_lora_rank or 0)
        if self.q_lora_rank is None:
            weights += h * heads * self.qk_head_dim
        else:
            weights += h * self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
            norms += self.q_lora_rank
        return weights, norms

    def _indexer_params(self) -> int:
        assert self.q_lora_rank is not None
        h, d, heads = self.hidden_size, self.index_head_dim, self.index_n_heads
        return self.q_lora_rank * heads * d + h * d + h * heads


def _indexer_schedule(config: ModelConfig) -> tuple[str, ...]:
    """Which layers own an indexer, when `indexer_types` is absent."""
    layers, extra = config.num_hidden_layers, config.extra
    pattern = extra.get("index_topk_pattern")
    if pattern:
        letters = {"F": "full", "S": "shared", "full": "full", "shared": "shared"}
        try:
            return tuple(letters[entry] for entry in pattern)
        except (KeyError, TypeError):
            raise ConfigError(f"index_topk_pattern {pattern!r} may hold only F and S") from None
    freq, offset = extra.get("index_topk_freq"), extra.get("index_skip_topk_offset")
    freq, offset = 1 if freq is None else freq, 2 if offset is None else offset
    for name, value in (("index_topk_freq", freq), ("index_skip_topk_offset", offset)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{name} is {value!r}; it must be an integer >= 0")
    freq = max(freq, 1)
    return tuple("full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers))


def _rope_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """theta and the rotary share from `rope_parameters` first, the top level second."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters is a {type(rope).__name__}, expected an object")
    for key in ("rope_parameters", "rope_scaling"):
        settings = raw.get(key)
        kind = settings.get("rope_type", settings.get("type")) if isinstance(settings, Mapping) else None
        if kind not in (None, "default"):
            raise ConfigError(f"{key}.rope_type {kind!r} is not supported; no GLM release uses it")
    values: dict[str, Any] = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        value = rope.get(name, raw.get(name))
        if value is not None:
            values[name] = _typed(name, "float", value)
    return values


def _typed(name: str, annotation: Any, value: Any) -> Any:
    """Check one JSON value against a field's annotation (a string, from `__future__`)."""
    kind = str(annotation)
    if value is None:
        if "None" in kind:
            return None
        raise ConfigError(f"{name} is null; it needs a value")
    if "tuple" in kind and isinstance(value, (list, tuple)):
        member = int if "tuple[int" in kind else str
        if not all(isinstance(item, member) and not isinstance(item, bool) for item in value):
            raise ConfigError(f"{name} is {value!r}; expected a list of {member.__name__}")
        return tuple(value)
    if kind.startswith("bool"):
        ok = isinstance(value, bool)
    elif kind.startswith("int"):
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif kind.startswith("float"):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            value = float(value) if ok else value
        except OverflowError:
            raise ConfigError(f"{name} is too large a number") from None
    elif kind.startswith("str"):
        ok = isinstance(value, str)
    else:
        ok = False
    if not ok:
        raise ConfigError(f"{name} is {value!r}; expected {kind}")
    return value
