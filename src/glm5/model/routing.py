"""What a router decides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Where each token goes. T tokens, K experts a token, E experts."""

    topk_ids_TK: Tensor  # int64
    topk_weights_TK: Tensor  # fp32, scaled
    scores_TE: Tensor  # fp32, sigmoid of the logits
