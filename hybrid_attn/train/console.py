"""The printed line of a step, and the format of numbers and tables."""

import math
from collections.abc import Mapping, Sequence

GB = 10**9
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def step_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """The line of a step: means since the last line where the values have them."""
    return f"step {step}/{total}  {summary(values)}"


def summary(values: Mapping[str, float]) -> str:
    """Loss, learning rate, speed and remaining time; unknown values are left out."""
    loss, bits = (values.get(f"{name}_mean", values[name]) for name in ("loss", "bits_per_byte"))
    parts = [f"stage {values['stage']}/{values['stages']} of {values['seq_len']:,}"] if values.get("stages", 1) > 1 else []
    parts += [f"loss {loss:.3f}", f"bpb {bits:.3f}", f"lr {values['lr']:.3g}", f"grad {values['grad_norm']:.2f}"]
    if math.isfinite(values["tokens_per_s"]):
        parts += [f"{values['tokens_per_s']:,.0f} tok/s", f"{100 * values['mfu']:.0f}% MFU"]
        parts.append(f"data {100 * values['data_wait'] / values['step_time']:.1f}%")
    else:
        parts.append(f"{values['step_time']:.1f} s with compilation")
    if "tokens_seen" in values:
        parts.append(f"{short_count(values['tokens_seen'])} tokens")
    if "peak_memory_bytes" in values:
        parts.append(f"peak {values['peak_memory_bytes'] / GB:.1f} GB")
    if 0 < values.get("seconds_left", math.nan) < math.inf:
        parts.append(f"{duration(values['seconds_left'])} left")
    return "  ".join(parts)


def short_count(number: int) -> str:
    """2,457,600 as 2.46M."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds as 3d 04h, 2h 05m, 5m 12s or 8s."""
    total = round(seconds)
    for large, small, names in ((86_400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if total >= large:
            return f"{total // large}{names[0]} {total % large // small:02d}{names[1]}"
    return f"{total}s"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; columns without a cell below the heading are left out, and the first two are aligned to the left."""
    columns = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    return ["  ".join(f"{row[i]:{'<' if i < 2 else '>'}{widths[i]}}" for i in columns).rstrip() for row in rows]
