"""The ways to compute shared attention, chosen by name and said in the log; none falls back.

========  ======  =========  ===========  ==================================================
body      device  gradients  TorchScript  computed by
========  ======  =========  ===========  ==================================================
flash     cpu     no         yes          torch's CPU flash kernel, one call for each user
flex      any     no         no           FlexAttention over all users; compiled on CUDA
dense     any     yes        yes          plain matrix products and a softmax
========  ======  =========  ===========  ==================================================

Training is always ``dense``; the choice is for scoring.
"""

import logging

FLASH = "flash"
FLEX = "flex"
DENSE = "dense"
AUTO = "auto"
DEVICES_BY_BODY = {FLASH: ("cpu",), FLEX: ("cpu", "cuda"), DENSE: ("cpu", "cuda")}
BODY_BY_DEVICE = {"cpu": FLASH, "cuda": FLEX}

logger = logging.getLogger(__name__)


def choose_body(name: str, device: str) -> str:
    """The body to score with.

    Args:
        name: of a body, or ``auto`` for the fastest of the device.
        device: its type, ``cpu`` or ``cuda``.

    Returns:
        The name of a body that runs there.

    Raises:
        ValueError: if there is no such body, or it does not run on the device.

    Example:
        >>> choose_body("auto", "cpu"), choose_body("dense", "cuda")
        ('flash', 'dense')
    """
    body = BODY_BY_DEVICE.get(device, DENSE) if name == AUTO else name
    if body not in DEVICES_BY_BODY:
        raise ValueError(f"attention body is {name!r}; one of {[AUTO, *DEVICES_BY_BODY]} exists")
    if name != AUTO and device not in DEVICES_BY_BODY[body]:
        raise ValueError(f"attention body {body} runs on {DEVICES_BY_BODY[body]}, not on {device}")
    logger.info("shared attention: body %s on %s", body, device)
    return body
