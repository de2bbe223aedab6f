"""AdamW and Muon over a model's parameters, and the learning rate of each step.

Muon orthogonalises the momentum of every matrix by Newton-Schulz (Jordan 2024) and scales it to
the root mean square that AdamW's updates have (0.2: Moonlight, arXiv 2502.16982), so that both
share one learning rate. Experts are many matrices; the up-projections of MLA are one matrix a head
("Muon Split", GLM-5 report, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from glm5.model.attention import MultiHeadLatentAttention
from glm5.model.moe import ExpertBank
from glm5.model.transformer import GlmForCausalLM
from glm5.training.recipe import OptimizerSection

UPDATE_RMS = 0.2
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

Blocks = Callable[[Tensor], list[Tensor]]


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of [..., m, n] by about 1 (0.7 to 1.2), in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised. `blocks` says which matrices a parameter is made of."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        blocks: dict[Tensor, Blocks],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.blocks = blocks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                split = self.blocks.get(parameter, _whole)
                for target, block in zip(split(parameter), split(update), strict=True):
                    scale = UPDATE_RMS * math.sqrt(max(block.shape[-2:]))
                    target.sub_(orthogonalise(block), alpha=group["lr"] * scale)


def _whole(matrix: Tensor) -> list[Tensor]:
    return [matrix]


def build_optimizers(model: GlmForCausalLM, settings: OptimizerSection) -> list[torch.optim.Optimizer]:
    """Muon for every matrix but embeddings and output head with AdamW for those, norms and biases;
    or AdamW for everything. Only matrices decay.
    """
    tables = {model.model.embed_tokens.weight, model.lm_head.weight}
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p not in tables]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    adam_matrices = [p for p in model.parameters() if p in tables]
    if settings.kind == "adamw":
        adam_matrices += matrices
    groups = [
        {"params": adam_matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=1e-10, fused=True)
    if settings.kind == "adamw":
        return [adamw]
    muon = Muon(
        matrices,
        matrix_blocks(model),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    return [muon, adamw]


def matrix_blocks(model: GlmForCausalLM) -> dict[Tensor, Blocks]:
    """The parameters that hold several matrices, each with the way to view them apart."""
    blocks: dict[Tensor, Blocks] = {}
    for module in model.modules():
        if isinstance(module, ExpertBank):
            width = module.down_proj.shape[2]
            blocks[module.gate_up_proj] = lambda w, i=width: [w[:, :i], w[:, i:]]  # type: ignore[misc]
        if isinstance(module, MultiHeadLatentAttention):
            heads, nope, latent = module.num_heads, module.nope_dim, module.latent_dim

            def kv_blocks(w: Tensor, h: int = heads, n: int = nope, r: int = latent) -> list[Tensor]:
                per_head = w.view(h, -1, r)
                return [per_head[:, :n], per_head[:, n:]]

            blocks[module.kv_b_proj.weight] = kv_blocks
            if module.q_a_proj is not None:
                blocks[module.q_b_proj.weight] = lambda w, h=heads: [w.view(h, -1, w.shape[1])]  # type: ignore[misc]
    return blocks


def learning_rate(settings: OptimizerSection, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then the schedule's decay."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - warmup) / max(1, steps - warmup)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)
