"""The ways to compute attention, chosen by name and said in the log; none falls back.

========  ======  =========  ===========  ==================================================
body      device  gradients  TorchScript  computed by
========  ======  =========  ===========  ==================================================
flash     cpu     no         yes          torch's CPU flash kernel, one call for each user
native    cpu     no         yes          C++ compiled for this CPU; float32, needs g++
flex      any     no         no           FlexAttention over all users; compiled on CUDA
dense     any     yes        yes          plain matrix products and a softmax
========  ======  =========  ===========  ==================================================

That is candidates over histories. Histories over themselves, and all of SiLU attention, are
``native`` or else torch's own operators. Training is always ``dense``; the choice is for scoring.
"""

import logging

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.native import load_native
from torchrec_kvshare.attention.shared import (
    Spans,
    causal_attention,
    full_attention,
    needs_gradients,
    shared_attention,
)
from torchrec_kvshare.attention.silu import silu_causal_attention, silu_shared_attention

FLASH = "flash"
NATIVE = "native"
FLEX = "flex"
DENSE = "dense"
AUTO = "auto"
DEVICES_BY_BODY = {
    FLASH: ("cpu",),
    NATIVE: ("cpu",),
    FLEX: ("cpu", "cuda"),
    DENSE: ("cpu", "cuda"),
}
BODY_BY_DEVICE = {"cpu": FLASH, "cuda": FLEX}

logger = logging.getLogger(__name__)


def choose_body(name: str, device: str) -> str:
    """The body to score with, ready to run.

    Args:
        name: of a body, or ``auto`` for the fastest of the device that needs no compiler.
        device: its type, ``cpu`` or ``cuda``.

    Returns:
        The name of a body that runs there.

    Raises:
        ValueError: if there is no such body, or it does not run on the device.
        ConfigError: if ``native`` cannot be compiled.

    Example:
        >>> choose_body("auto", "cpu"), choose_body("dense", "cuda")
        ('flash', 'dense')
    """
    body = BODY_BY_DEVICE.get(device, DENSE) if name == AUTO else name
    if body not in DEVICES_BY_BODY:
        raise ValueError(f"attention body is {name!r}; one of {[AUTO, *DEVICES_BY_BODY]} exists")
    if name != AUTO and device not in DEVICES_BY_BODY[body]:
        raise ValueError(f"attention body {body} runs on {DEVICES_BY_BODY[body]}, not on {device}")
    if body == NATIVE:
        load_native()
    logger.info("attention: body %s on %s", body, device)
    return body


class Attention(nn.Module):
    """What an encoder attends with: arguments and results are those of the functions it calls.

    Attributes:
        native: whether ``native`` computes what it can. A constant of a scripted program, so that
            one without it holds no call of operators that the loading process may not have.
    """

    __constants__ = ("native",)

    def __init__(self) -> None:
        super().__init__()
        self.native = False

    def shared(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        biases: list[Tensor],
        spans: Spans,
        body: str,
    ) -> Tensor:
        """See ``attention/shared.py``."""
        if self.native and body == "native":
            refuse_gradients([queries, keys, values, own_keys, own_values] + biases)
            return torch.ops.torchrec_kvshare.shared_attention(
                queries, keys, values, own_keys, own_values, biases, spans.candidates, spans.events
            )
        return shared_attention(queries, keys, values, own_keys, own_values, biases, spans, body)

    def silu_shared(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        biases: list[Tensor],
        spans: Spans,
        body: str,
    ) -> Tensor:
        """See ``attention/silu.py``; every body but ``native`` is the one there."""
        if self.native and body == "native":
            refuse_gradients([queries, keys, values, own_keys, own_values] + biases)
            return torch.ops.torchrec_kvshare.silu_shared_attention(
                queries, keys, values, own_keys, own_values, biases, spans.candidates, spans.events
            )
        return silu_shared_attention(queries, keys, values, own_keys, own_values, biases, spans)

    def causal(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_spans: list[tuple[int, int]],
        key_spans: list[tuple[int, int]],
        window: int,
    ) -> Tensor:
        """See ``attention/shared.py``."""
        if self.native:
            refuse_gradients([queries, keys, values])
            return torch.ops.torchrec_kvshare.causal_attention(
                queries, keys, values, query_spans, key_spans, window
            )
        return causal_attention(queries, keys, values, query_spans, key_spans, window)

    def silu_causal(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_spans: list[tuple[int, int]],
        key_spans: list[tuple[int, int]],
        window: int,
    ) -> Tensor:
        """See ``attention/silu.py``."""
        if self.native:
            refuse_gradients([queries, keys, values])
            return torch.ops.torchrec_kvshare.silu_causal_attention(
                queries, keys, values, query_spans, key_spans, window
            )
        return silu_causal_attention(queries, keys, values, query_spans, key_spans, window)

    def full(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        query_spans: list[tuple[int, int]],
        key_spans: list[tuple[int, int]],
    ) -> Tensor:
        """See ``attention/shared.py``."""
        if self.native:
            refuse_gradients([queries, keys, values])
            return torch.ops.torchrec_kvshare.full_attention(
                queries, keys, values, query_spans, key_spans
            )
        return full_attention(queries, keys, values, query_spans, key_spans)


def refuse_gradients(tensors: list[Tensor]) -> None:
    """Raise where autograd would follow what ``native`` computes."""
    if needs_gradients(tensors):
        raise RuntimeError("body native has no gradients; body dense has")
