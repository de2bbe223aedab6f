"""Loading by path or hub name; the same names and arguments as `transformers`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5.errors import CheckpointError, RequestError
from glm5.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from glm5.checkpoint.directory import Checkpoint
    from glm5.checkpoint.filling import SchemeOf
    from glm5.runtime.language_model import LanguageModel

logger = logging.getLogger(__name__)

EMBEDDED = "nano"
SMALL_MODEL_BYTES = 1 << 30
_LEAST_CONTEXT = 4096  # tokens that there must be room for
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # never ./name or ../name
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    load_in_4bit: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """A model ready to talk: a checkpoint directory, a hub name, or (None) the embedded model.

    dtype: None = what is fastest and fits: fp32 for a small model on the CPU, else as stored;
        "auto" = as stored (FP8 becomes bf16), as in `transformers`; or a torch dtype or its name.
    device: "auto" = a GPU that has room, else the CPU; or a torch device string.
    load_in_4bit: round the weights to int4 while they are read (`glm5.quantize`); a checkpoint that
        is int4 already is loaded as it is.
    progress: called with (bytes read, bytes in all) while loading.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the checkpoint cannot be used.
    """
    import torch

    from glm5.checkpoint.directory import Checkpoint
    from glm5.planner.bytes import weight_bytes
    from glm5.runtime.language_model import LanguageModel

    checkpoint = Checkpoint(resolve(path))
    wanted = _torch_dtype(dtype)
    quantize = _rounding(checkpoint) if load_in_4bit else None
    chosen = _device(device, checkpoint, wanted, quantize)
    if chosen == "cpu":
        _refuse_beyond_memory(checkpoint, wanted, quantize)
    if dtype is None and chosen == "cpu":
        # fp32 keeps more of a small model's answers and costs it nothing that matters.
        small = weight_bytes(checkpoint, torch.float32, quantize).total <= SMALL_MODEL_BYTES
        wanted = torch.float32 if small else None
    return LanguageModel.load(checkpoint, dtype=wanted, device=chosen, quantize=quantize, progress=progress)


def _refuse_beyond_memory(
    checkpoint: Checkpoint, dtype: torch.dtype | None, quantize: SchemeOf | None
) -> None:
    """Weights and a small cache past the machine's memory would be written to swap, or end the process."""
    from glm5.planner.bytes import cache_bytes_per_token, weight_bytes

    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    weights = weight_bytes(checkpoint, dtype, quantize).total
    tokens = min(_LEAST_CONTEXT, checkpoint.config.max_position_embeddings)
    cache = tokens * cache_bytes_per_token(checkpoint.config, dtype or checkpoint.float_dtype)
    if weights + cache > memory:
        packed = checkpoint.is_packed or quantize is not None
        advice = "use a smaller model" if packed else "load_in_4bit=True, or `glm5 quantize`, takes a quarter"
        raise CheckpointError(
            f"{checkpoint.directory}: its weights take {weights / 1e9:.1f} GB and {tokens:,} tokens of cache "
            f"{cache / 1e9:.1f} GB; this machine has "
            f"{memory / 1e9:.1f} GB of memory; {advice}"
        )


def _rounding(checkpoint: Checkpoint) -> SchemeOf | None:
    """The default recipe with the largest group that divides every width; None where it is packed already."""
    from glm5.checkpoint.filling import stored_scheme
    from glm5.quantize import Recipe, widest_group

    if checkpoint.is_packed:
        scheme_of = stored_scheme(checkpoint)
        packed = [name for name in checkpoint.index.names if name.endswith(".weight_packed")]
        bits = {scheme.bits for name in packed if (scheme := scheme_of(name.removesuffix(".weight_packed")))}
        if bits and 4 not in bits:
            raise RequestError(
                f"{checkpoint.directory}: its weights are packed in {max(bits)} bits; load it without "
                "load_in_4bit, or quantize the model that it was made from"
            )
        return None
    # A head of its own in 8 bits: half of its bytes at each token, and nothing lost that can be measured.
    rules = () if checkpoint.config.tie_word_embeddings else (("lm_head", 8),)
    return Recipe(group=widest_group(checkpoint.config), rules=rules).scheme_of


def resolve(path: str | os.PathLike[str] | None) -> Path:
    """The directory of a checkpoint: a path as it is, a hub name fetched, None the embedded one."""
    if path is None or (str(path) == EMBEDDED and not Path(path).exists()):
        directory = Path(str(resources.files("glm5").joinpath("embedded", EMBEDDED)))
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory}: the embedded model is not in this installation; name another"
            )
        return directory
    if not str(path).strip():
        raise CheckpointError("the model's name is empty; name a directory, a hub name, or nothing at all")
    directory = Path(path)
    try:
        exists = directory.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise CheckpointError(f"{str(directory)[:200]}: cannot be read ({error.strerror})") from None
    if directory.is_dir():
        snapshots = sorted(directory.glob("step-*/config.json"))
        if snapshots and not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory}: is the folder of a run; name a snapshot: {snapshots[-1].parent}"
            )
        return directory
    if exists and directory.suffix.lower() == ".gguf":
        raise CheckpointError(
            f"{directory}: is a GGUF file; make a directory of it: glm5 quantize {directory} DIRECTORY"
        )
    if exists:
        raise CheckpointError(f"{directory}: is a file; name the directory that holds config.json")
    if _HUB_NAME.fullmatch(str(path)):
        return _from_hub(str(path))
    raise CheckpointError(f"{directory}: no such directory")


def _from_hub(name: str) -> Path:
    """Fetch weights and text files; code files of a repository are never fetched."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's many errors, network ones included
        raise CheckpointError(
            f"{name}: no such directory here, and the hub did not give it ({_hub_problem(error)}); check the "
            "name, or fetch it on a machine with a network and name the directory"
        ) from None


def _hub_problem(error: Exception) -> str:
    """The hub's many errors in a few words."""
    from huggingface_hub import errors

    text = " ".join(str(error).split())
    if isinstance(error, errors.GatedRepoError):
        return "it asks for a licence to be accepted on its page, and for a token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it has no such model, or not for you"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set, and it was not fetched before"
    if isinstance(error, errors.LocalEntryNotFoundError) or "ConnectError" in text or "Connection" in text:
        return "no connection, and it was not fetched before"
    return text.partition(". ")[0][:160]


class AutoModelForCausalLM:
    """`from_pretrained`, with the arguments of `transformers`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        dtype: str | torch.dtype | None = "auto",
        torch_dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> LanguageModel:
        """Load a checkpoint directory or hub name.

        device_map: "auto", "cpu", "cuda", "cuda:N" or N, or {"": one of them}; a map of modules is not
            supported yet. None = "cpu".
        trust_remote_code: accepted and never acted on: no code of a checkpoint runs here.
        load_in_4bit: round the weights to int4 while they are read; nothing to do for int4 checkpoints.
        Arguments that choose between ways of transformers' own are accepted and change nothing:
        attn_implementation, low_cpu_mem_usage, use_safetensors=True, quantization_config=None.
        """
        _refuse_unknown(unknown, trust_remote_code)
        return load(
            pretrained_model_name_or_path,
            dtype=torch_dtype if torch_dtype is not None else dtype,
            device=_one_device(device_map),
            load_in_4bit=load_in_4bit,
        )


class AutoTokenizer:
    """`from_pretrained` for the tokenizer alone."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> Tokenizer:
        """Read the tokenizer of a checkpoint directory or hub name; no code of it runs.

        use_fast=True and padding_side="left" are what it does anyway.
        """
        _refuse_unknown(unknown, trust_remote_code)
        return Tokenizer.from_pretrained(resolve(pretrained_model_name_or_path))


# What may be stated without meaning anything here: (name, the values that are so).
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attn_implementation": (None, "eager", "sdpa"), "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True), "quantization_config": (None,), "use_fast": (None, True),
    "padding_side": (None, "left"), "revision": (None, "main"), "token": (None,), "cache_dir": (None,),
}  # fmt: skip


def _refuse_unknown(unknown: dict[str, Any], trust_remote_code: bool) -> None:
    if trust_remote_code:
        logger.warning("trust_remote_code=True changes nothing: glm5 never runs code from a checkpoint")
    for name, value in sorted(unknown.items()):
        if name not in _HARMLESS:
            raise RequestError(f"from_pretrained has no argument {name!r}; leave it out")
        if not any(value is known or value == known for known in _HARMLESS[name]):
            raise RequestError(f"from_pretrained: {name}={value!r} is not supported; leave it out")


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        found: Any = dtype
    else:
        if not isinstance(dtype, str):
            raise RequestError(f"dtype {dtype!r} is unknown; use auto, float32, float16 or bfloat16")
        short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
        found = getattr(torch, short.get(dtype, dtype), None)
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise RequestError(f"dtype {dtype!r} is unknown; use auto, float32, float16 or bfloat16")
    return found


def _one_device(device_map: Any) -> str:
    """`device_map` as one device: N is the Nth GPU, as in `accelerate`."""
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise RequestError("device_map may be 'auto' or one device; a map of modules is not there yet")
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    return f"cuda:{device_map}" if type(device_map) is int else str(device_map)


def _device(device: str, checkpoint: Checkpoint, dtype: torch.dtype | None, quantize: SchemeOf | None) -> str:
    """Resolve "auto": the GPU with most free memory if the weights fit it, else the CPU."""
    import torch

    if device != "auto":
        try:
            kind, number = torch.device(device).type, torch.device(device).index or 0
        except (RuntimeError, TypeError):
            kind, number = "", 0
        if kind not in ("cpu", "cuda", "mps"):
            raise RequestError(f"device {device!r} is unknown; use auto, cpu or cuda:N")
        if kind == "mps" and not torch.backends.mps.is_available():
            raise RequestError(f"device {device!r} is asked for, but this torch has no Metal; use cpu")
        if kind == "cuda" and number >= torch.cuda.device_count():
            seen = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
            raise RequestError(f"device {device!r} is asked for, but this torch sees {seen}; use cpu")
        return device
    if not torch.cuda.is_available():
        return "cpu"
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    best = max(range(len(free)), key=free.__getitem__)
    from glm5.planner.bytes import weight_bytes

    needed = weight_bytes(checkpoint, dtype, quantize).total * 1.1
    return f"cuda:{best}" if needed < free[best] else "cpu"
