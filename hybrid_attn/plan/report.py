"""A plan as text: whether it fits, memory, FLOPs, and what is sent between devices, by mesh axis."""

from collections import Counter

from hybrid_attn.bench.measurement import table
from hybrid_attn.plan.step import Plan, payload
from hybrid_attn.plan.targets import GB


def report(plan: Plan) -> str:
    """The lines and tables of a plan."""
    t = plan.target
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.axes.items())
    size, kind, where = plan.largest
    host = f"; beside them {gb(plan.host)} of the host's memory" if plan.host else ""
    lines = [
        verdict(plan),
        f"target       {t.name}: {len(t.devices)} {t.devices[0].device_kind} devices; the numbers below are per device",
        f"mesh         {axes}",
        f"memory       {gb(plan.peak)} at the peak: {gb(plan.arguments)} parameters, optimiser state and batch, and "
        f"{gb(plan.peak - plan.arguments)} activations, gradients and new values{host}",
        f"largest      {gb(size)} {kind}: {where}",
        f"FLOPs        {plan.flops:.4g} by the formula, recomputation not counted; {plan.compiler_flops:.4g} by the compiler, "
        "which counts a loop's body once and custom kernels not at all",
    ]
    calls, received, by_axes = Counter(), Counter(), Counter()
    for x in plan.collectives:
        axes = " ".join(x.axes)
        key = x.kind, axes, payload(x), "backward" if x.backward else "forward"
        calls[key] += x.times
        received[key] += x.total
        by_axes[axes] += x.total
    rows = [[*key, f"{calls[key]:,}", gb(total)] for key, total in received.most_common()]
    header = ["collective", "axes", "of", "pass", "calls a step", "received"]
    sums = [[axes, "", gb(total)] for axes, total in by_axes.most_common()]
    return "\n".join([*lines, "", table(header, rows), "", table(["axes", "", "received"], sums)])


def fits(plan: Plan) -> bool:
    """Whether a device has room for the peak."""
    return plan.peak <= plan.target.memory


def verdict(plan: Plan) -> str:
    """Whether a device has room, for what, and how much is left or missing."""
    memory, devices = plan.target.memory, len(plan.target.devices)
    device = "a device"
    if plan.target.platform == "cpu":
        device += f", {'an equal part' if devices > 1 else 'all'} of this machine's"
    if fits(plan):
        return f"fits         {gb(plan.peak)} of the {gb(memory)} of {device}; {gb(memory - plan.peak)} are left"
    return (
        f"DOES NOT FIT {gb(plan.peak)}, and {gb(memory)} is the memory of {device}; {gb(plan.peak - memory)} too much: use "
        "more devices, a larger mesh.fsdp or mesh.context, train.remat, more stages[i].microbatches or a smaller batch"
    )


def gb(size: float) -> str:
    """Bytes in GB (10^9), MB or kB."""
    unit, name = next(((unit, name) for unit, name in ((GB, "GB"), (10**6, "MB")) if size >= unit), (1000, "kB"))
    return f"{size / unit:,.3f} {name}"
