"""The directory that `quantize` writes, read by vLLM 0.33 without an accelerator.

vLLM's own config parser, model classes (the one for CUDA too) and weight loaders, up to the point
where it would repack the words for a kernel; what its layers hold then is unpacked by compressed-tensors
and compared with our floats. Only the choices of kernels and of sparse attention, which need a device, are
taken from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from glm5.checkpoint import names
from glm5.config import MODEL_TYPES
from glm5.quantize import Recipe, quantize
from tests.quantize.quantize_fixture import as_floats, save_source, small_config

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # which vLLM reads when it is imported; nothing else does
pytest.importorskip("vllm")

# Widths that groups of 128 divide; index heads as vLLM wants them.
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
MLA = {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32}
MLA |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
CHANGES = {
    "glm_moe_dsa": MLA | {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 64},
    "glm4_moe_lite": MLA,
    "glm4_moe": {"head_dim": 32},
}
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "wk_weights_proj": ("wk", "weights_proj"),
}
ATTENTION_8 = ["*.self_attn.*=8"]
RECIPES = {
    "4 bits": Recipe(4, 64),
    "8 bits": Recipe(8, 64),
    "group 32": Recipe(4, 32),
    "group 128": Recipe(4, 128),
    "attention 8": Recipe.of(4, 64, ATTENTION_8, []),
    "head 8": Recipe.of(4, 64, ["lm_head=8"], []),
    "experts of a layer 8": Recipe.of(4, 64, ["model.layers.1.mlp.experts.*=8"], []),
    "experts kept": Recipe.of(4, 64, [], ["*.mlp.experts.*"]),
    "shared experts kept": Recipe.of(4, 64, [], ["*.shared_experts.*"]),
}
SPARSE = "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A parallel world of one, and stand-ins for what needs a device."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.platforms import current_platform
    from vllm.v1.worker.workspace import init_workspace_manager

    usual = type(current_platform).get_attn_backend_cls

    def backend(selected_backend: Any = None, attn_selector_config: Any = None, **options: Any) -> str:
        if attn_selector_config.use_sparse:
            return SPARSE
        return usual(selected_backend, attn_selector_config, **options)

    class NoKernel(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: nn.Module) -> None: ...

        def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            raise NotImplementedError

    schemes = "vllm.model_executor.layers.quantization.compressed_tensors"
    dense = f"{schemes}.schemes.compressed_tensors_wNa16.choose_mp_linear_kernel"
    experts = f"{schemes}.compressed_tensors_moe.compressed_tensors_moe_wna16.select_wna16_moe_backend"
    with (
        mock.patch(dense, return_value=NoKernel),
        mock.patch(experts, return_value=(WNA16MoEBackend.MARLIN, None)),
        mock.patch.object(current_platform, "get_attn_backend_cls", backend),
        mock.patch("torch.accelerator.empty_cache"),
        set_current_vllm_config(VllmConfig()),
    ):
        store = f"file://{tmp_path_factory.mktemp('store')}/store"
        distributed.init_distributed_environment(1, 0, store, 0, "gloo")
        distributed.ensure_model_parallel_initialized(1, 1)
        init_workspace_manager(torch.device("cpu"))
        yield
        distributed.cleanup_dist_env_and_memory()


def directory_of(folder: Path, model_type: str, recipe: Recipe) -> Path:
    save_source(folder / "source", small_config(model_type, **WIDTHS, **CHANGES[model_type]))
    quantize(folder / "source", folder / "int4", recipe)
    return folder / "int4"


def our_weights(directory: Path) -> dict[str, Tensor]:
    model = as_floats(directory)
    tensors = names.state_tensors(model)
    return {piece.name: piece.of(tensors[piece.parameter]).detach() for piece in names.pieces(model)}


def config_of(directory: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(directory), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    ).create_engine_config()  # fmt: skip


def loaded(config: Any, mtp: bool, model_class: type[nn.Module] | None = None) -> nn.Module:
    """vLLM's model with the weights of the directory; what it left alone is NaN or -1."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    of_model = config.speculative_config.draft_model_config if mtp else config.model_config
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            model = initialize_model(config, model_config=of_model, model_class=model_class)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan if parameter.is_floating_point() else -1)
            model.load_weights(DefaultModelLoader(config.load_config).get_all_weights(of_model, model))
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def unpacked(words: Tensor, scales: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size((words.shape[0], words.shape[1] * 32 // bits))
    codes = unpack_from_int32(words.contiguous(), bits, shape).float()
    return (codes.unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)).flatten(1)


def held(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """What vLLM's layers hold: names on disk and their values, one below the other."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    for path, module in model.named_modules():
        disk = path.replace(".mtp_block.", ".")
        if isinstance(module, RoutedExperts):
            yield from held_by_experts(disk.removesuffix(".routed_experts"), module)
            continue
        own = dict(module.named_parameters(recurse=False))
        if "weight_packed" in own:
            own["weight"] = unpacked(own["weight_packed"], own["weight_scale"], module.scheme.num_bits)
        parent, _, last = disk.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(last, (last,))] if parent else [disk]
        for kind in ("weight", "bias", "e_score_correction_bias"):
            if own.get(kind) is not None:
                yield [f"{part}.{kind}" for part in parts], own[kind].detach()


def held_by_experts(disk: str, module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    for weight, parts in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        for expert in range(module.local_num_experts):
            if hasattr(module, f"{weight}_weight_packed"):
                words, scales = (getattr(module, f"{weight}_weight_{kind}") for kind in ("packed", "scale"))
                values = unpacked(words[expert], scales[expert], module.quant_method.num_bits)
            else:
                values = getattr(module, f"{weight}_weight")[expert].detach()
            yield [f"{disk}.{expert}.{part}.weight" for part in parts], values


def check(model: nn.Module, wanted: dict[str, Tensor]) -> set[str]:
    """Every value is ours; returns the names on disk that were seen."""
    seen: set[str] = set()
    for parts, values in held(model):
        # The MTP layer's head and embeddings are replaced by the model's when both are loaded.
        if parts[0].endswith("shared_head.head.weight") or (
            parts == ["model.embed_tokens.weight"] and type(model).__name__.endswith("MTP")
        ):
            continue
        expected = torch.cat([wanted[part] for part in parts])
        assert torch.equal(values.float(), expected), parts
        seen.update(parts)
    return seen


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_vllm_holds_our_weights(tmp_path: Path, model_type: str, recipe: str) -> None:
    directory = directory_of(tmp_path, model_type, RECIPES[recipe])
    wanted = our_weights(directory)
    config = config_of(directory)
    seen = check(loaded(config, mtp=False), wanted)
    seen |= check(loaded(config, mtp=True), wanted)
    assert seen == wanted.keys()


@pytest.mark.parametrize("recipe", ["4 bits", "attention 8"])
def test_the_model_class_for_cuda_holds_our_weights(tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("vllm.models.deepseek_v32.nvidia.model", exc_type=ImportError)
    from vllm.models.deepseek_v32.nvidia import model, mtp

    directory = directory_of(tmp_path, "glm_moe_dsa", RECIPES[recipe])
    wanted = our_weights(directory)
    config = config_of(directory)
    seen = check(loaded(config, mtp=False, model_class=model.DeepseekV32ForCausalLM), wanted)
    seen |= check(loaded(config, mtp=True, model_class=mtp.DeepseekV32MTP), wanted)
    assert seen == wanted.keys()
