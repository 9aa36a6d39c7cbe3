"""What a runtime refuses of the tensors that a host gives it: one telling for all of them.

Behind a look-up nothing is refused for sure: some kernels take a negative row for none, and some
read past the end of a table. Runs in TorchScript.
"""

import torch
from torch import Tensor


def check_range(name: str, values: Tensor, least: int, most: int) -> None:
    """Refuse integers outside of a range, naming the first."""
    if values.dtype != torch.int64:
        raise ValueError(f"{name} holds no int64")
    if values.dim() != 1:
        raise ValueError(f"{name} has {values.dim()} dimensions; it must have 1")
    if values.size(0) == 0:
        return
    # Of one request most tensors have one number.
    lowest, highest = (values, values) if values.size(0) == 1 else torch.aminmax(values)
    if int(lowest) < least or int(highest) > most:
        place = int(((values < least) | (values > most)).nonzero()[0])
        raise ValueError(
            f"{name} holds {int(values[place])} at place {place}; from {least} to {most} is allowed"
        )


def sums_by_row(numbers: Tensor, lengths: Tensor) -> Tensor:
    """Sums [B] of the numbers [R] of each row, one row's behind the other's."""
    totals = torch.constant_pad_nd(numbers.cumsum(0), [1, 0])
    ends = lengths.cumsum(0)
    return totals[ends] - totals[ends - lengths]


def check_num_ids(num_ids: Tensor, most: int) -> None:
    """Refuse a request that has too many ids [B] in its bags, naming its place."""
    if num_ids.size(0) > 0 and int(num_ids.max()) > most:
        place = int(num_ids.argmax())
        raise ValueError(
            f"request {place} has {int(num_ids[place])} ids in multi-valued columns; at most "
            f"{most} are allowed"
        )


def check_times(name: str, times: Tensor, request_time: int, first_place: int) -> None:
    """Refuse times [L] of one history that decrease or are not before the request's; names one.

    Args:
        name: of the tensor that they are a part of.
        times: Unix seconds.
        request_time: likewise.
        first_place: of the first of them in that tensor.
    """
    if times.size(0) == 0:
        return
    steps_back = times[1:] < times[:-1]
    if int(times[-1]) < request_time and not bool(steps_back.any()):
        return
    # Not in place on a slice: TorchScript changed nothing there.
    is_wrong = (times >= request_time) | torch.constant_pad_nd(steps_back, [1, 0])
    place = int(is_wrong.nonzero()[0])
    said = f"{name}[{first_place + place}] is {int(times[place])}, "
    if int(times[place]) >= request_time:
        raise ValueError(f"{said}not before the request's time {request_time}")
    raise ValueError(
        f"{said}before {name}[{first_place + place - 1}] = {int(times[place - 1])}: events are "
        "given oldest first"
    )


def check_finite(name: str, values: Tensor) -> None:
    """Refuse numbers of which some are not finite, with their number."""
    # One pass over them in place of three; a sum of finite numbers may overflow.
    if not bool(torch.isfinite(values.sum())):
        num_wrong = int((~torch.isfinite(values)).sum())
        if num_wrong > 0:
            raise ValueError(f"{name}: {num_wrong} of {values.numel()} numbers are not finite")


def check_scores(logits: Tensor) -> None:
    """Refuse logits [C] that are not finite, naming the candidates."""
    if not bool(torch.isfinite(logits.sum())):
        wrong: list[int] = (~torch.isfinite(logits)).nonzero().flatten().tolist()
        if len(wrong) > 0:
            named = ", ".join([str(place) for place in wrong[:10]])
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"the model gave no finite score for candidates {named}{more}")
