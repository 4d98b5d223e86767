"""Predict the seconds of an update from a dry run and a card's figures, and what bounds them.

Each kernel takes the longer of its FLOPs at the card's rate and its bytes at the card's memory bandwidth. The host
launches kernels one after another, so a loss takes at least `LAUNCH_S` for each call, however fast the card is. Copies
of swapped blocks run beside the computation and compete with it for memory: max(computing, copying) + g copying, as in
docs/memory.md. The constants were fitted to updates of 20 B parameters on one H200 (bench/results/h200.jsonl).
"""

from __future__ import annotations

from dataclasses import dataclass

from teasr.training.footprint import Calls, Footprint

OF_MATMUL = 0.755  # large matrix products reach this part of the nominal bf16 rate; measured on an H200
OF_BANDWIDTH = 0.855  # large copies within the card's memory; measured on an H200
REACHED = 0.55  # kernels of an update reach this part of both rates; fitted
LAUNCH_S = 13.5e-6  # for each call, views included, on the host of the H200; fitted (11.5 to 16 by row)
COPY_COST = 0.3  # g: part of the copying that slows the computation down; fitted
STEP_S = 0.1  # optimiser step on the card: checks, clipping and thousands of small tensors; measured on an H200
HOST_BYTES_S = 20e9  # bytes a second of AdamW in host memory: assumed
ADAM_BYTES = 28  # read and written for each trained parameter


@dataclass(frozen=True)
class Card:
    """Figures of a GPU and its link: memory in GiB, nominal bf16 FLOP/s, memory bandwidth and PCIe rate in bytes/s."""

    memory_gib: float
    flops: float
    bandwidth: float
    pcie: float


# nominal rates without sparsity, with accumulation in fp32; PCIe as measured (H200) or reported for x16 links
CARDS = {
    "H200": Card(141, 989e12, 4.8e12, 54.7e9),
    "H100": Card(80, 989e12, 3.35e12, 54.7e9),
    "A100": Card(80, 312e12, 2.04e12, 25e9),
    "4090": Card(24, 165e12, 1.01e12, 24e9),
    "3090": Card(24, 71e12, 0.936e12, 24e9),
    "3060": Card(12, 25.6e12, 0.36e12, 24e9),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one update, and the share of each bound: compute, memory, launching, PCIe, optimiser.

    copying: seconds of copies from host memory, of swapped blocks and activation checkpoints. hidden: how much of that
    does not add to the seconds.
    """

    seconds: float
    parts: dict[str, float]
    copying: float = 0.0
    hidden: float = 0.0

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        return max(self.parts, key=self.parts.get)


def predict(footprint: Footprint, card: Card) -> Prediction:
    """Predict an update on a card with one rank."""
    parts = dict.fromkeys(("compute", "memory", "launching", "PCIe", "optimiser"), 0.0)
    copying, alone = footprint.copied / card.pcie, 0.0
    for name, calls in footprint.calls.items():
        seconds, bound = predict_loss(footprint, name, card)
        parts[bound] += seconds
        alone += max(_bounds(calls, card).values())
    hidden = alone + copying - sum(parts.values())
    parts["optimiser"] = step_seconds(footprint, card)
    return Prediction(sum(parts.values()), parts, copying, hidden)


def predict_loss(footprint: Footprint, name: str, card: Card) -> tuple[float, str]:
    """Return the seconds of one loss, forwards and backwards, in one update, and what bounds it."""
    calls = footprint.calls[name]
    copying = calls.copied / card.pcie
    bounds = _bounds(calls, card) | {"PCIe": copying}
    bound = max(bounds, key=bounds.get)
    return bounds[bound] + COPY_COST * copying, bound


def _bounds(calls: Calls, card: Card) -> dict[str, float]:
    """Return the seconds that calls need without copies, by what bounds them."""
    computing = memory = 0.0
    for work, n in calls.kernels.items():
        for_flops = work.flops / (card.flops * OF_MATMUL * REACHED)
        for_bytes = work.bytes / (card.bandwidth * OF_BANDWIDTH * REACHED)
        if for_flops > for_bytes:
            computing += n * for_flops
        else:
            memory += n * for_bytes
    launching = LAUNCH_S * (sum(calls.kernels.values()) + calls.views)
    return {"compute" if computing > memory else "memory": computing + memory, "launching": launching}


def step_seconds(footprint: Footprint, card: Card) -> float:
    """Return the seconds of the optimiser's step; offloaded, it copies gradients and weights and works on the host."""
    if not footprint.on_host:
        return STEP_S
    return STEP_S + footprint.trained * (ADAM_BYTES / HOST_BYTES_S + 8 / card.pcie)


def table(footprint: Footprint, pictures: int) -> str:
    """Format the prediction for every card as text; `pictures`: of one update on this rank."""
    lines = ["", f"{'predicted':20s}{'s an update':>14s}{'s a picture':>14s}   bound by"]
    for name, card in CARDS.items():
        found = predict(footprint, card)
        shares = ", ".join(
            f"{part} {s / found.seconds:.0%}" for part, s in sorted(found.parts.items(), key=lambda x: -x[1]) if s
        )
        need = footprint.gpu_total / 2**30
        fits = "" if need <= card.memory_gib else f"; does not fit its {card.memory_gib:g} GiB"
        copies = f"; {found.hidden:.1f} of {found.copying:.1f} s of copies hidden" if found.copying else ""
        lines.append(f"  {name:18s}{found.seconds:14.2f}{found.seconds / pictures:14.2f}   {shares}{copies}{fits}")
    return "\n".join(lines)
