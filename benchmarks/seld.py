"""Networks of stereo SELD side by side: parameters, multiplications, and seconds for a clip of 5 s.

    python benchmarks/seld.py [--networks small htsat …] [--threads 1] [--repeats 5]

A network is its encoder with the front end, and its head for 13 classes, with random weights: neither number depends on
them. Multiply-accumulate operations are those of matrix products and convolutions as PyTorch dispatches them
(``torch.utils.flop_counter``, two operations each), whoever calls them, attention included; transforms, norms and
activations are left out.
Seconds are the shortest of several runs with one clip; beside them the processor's, which do not count what else the
machine does meanwhile (with several threads: the sum over them).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from audio_llm.encoders.seld_head import SELDHead, SELDNetwork
from audio_llm.model.encoder import build_encoder

SMALL = Path(__file__).parents[1] / "recipes" / "seld" / "small.yaml"
NETWORKS: dict[str, dict[str, Any]] = {
    "small": yaml.safe_load(SMALL.read_text())["encoder"],
    "htsat": {"name": "htsat"},
    **{
        f"cnn14 {preset}": {"name": "cnn14", "preset": preset}
        for preset in ("conformer", "bimamba", "bimamba_ac", "conbimamba", "conbimamba_ac")
    },
}


def products(network: SELDNetwork, waveform: torch.Tensor, lengths: torch.Tensor) -> int:
    """Multiply-accumulate operations of one pass."""
    # The counter does not know the fused attention of CPUs; as plain products it does the same work in the open.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(waveform, lengths)
    return counter.get_total_flops() // 2


def shortest(network: SELDNetwork, waveform: torch.Tensor, lengths: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Seconds by the clock and by the processor."""
    network(waveform, lengths)
    best = (math.inf, math.inf)
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        network(waveform, lengths)
        best = (min(best[0], time.perf_counter() - clock), min(best[1], time.process_time() - processor))
    return best


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"one clip of 5 s, stereo, float32, torch {torch.__version__}, {args.threads} thread(s), CPU\n")
    print("| network | parameters | MACs, G | clock, ms | processor, ms |\n|---|---|---|---|---|")
    for name in args.networks:
        encoder = build_encoder(NETWORKS[name]).eval()
        network = SELDNetwork(encoder, SELDHead(encoder)).eval()
        waveform = torch.randn(1, 2, encoder.window_samples) * 0.1
        lengths = torch.tensor([encoder.window_samples])
        size = sum(parameter.numel() for parameter in network.parameters())
        work = products(network, waveform, lengths)
        clock, processor = shortest(network, waveform, lengths, args.repeats)
        print(f"| {name} | {size:,} | {work / 1e9:.2f} | {1000 * clock:.0f} | {1000 * processor:.0f} |", flush=True)


if __name__ == "__main__":
    main()
