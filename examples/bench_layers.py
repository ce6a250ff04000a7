"""How fast and how exact a quantized layer is on this machine, shape by shape, beside float32 ``nn.Linear``.

python examples/bench_layers.py [--rows 1 16 256] [--threads 1]

Each figure is ``nn.Linear`` time / layer time (above 1 is faster than float), medians of runs that take turns. In
brackets, the relative L2 error against a float64 product with the layer's own dequantized weights.
"""

import argparse
import copy
import math
import platform
import statistics

import torch
from torch import nn
from torch.utils.benchmark import Timer

from tinyq_lightning import quantize

SHAPES = [(384, 384), (768, 768), (3072, 768), (768, 3072), (4096, 1024), (1024, 4096)]  # out, in
METHODS = ("w8a32", "w8a16", "w8a8")


def seconds(module: nn.Module, x: torch.Tensor) -> float:
    timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256], help="rows of the batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, ", end="")
    print(f"torch {torch.__version__}, {args.threads} thread(s)")
    ratios: dict[str, list[float]] = {method: [] for method in METHODS}
    with torch.inference_mode():
        for out_features, in_features in SHAPES:
            linear = nn.Linear(in_features, out_features)
            models = {"float": linear}
            for method in METHODS:
                models[method] = nn.Sequential(copy.deepcopy(linear))
                quantize(models[method], method)
            for rows in args.rows:
                x = torch.randn(rows, in_features)
                times: dict[str, list[float]] = {name: [] for name in models}
                for _ in range(args.rounds):
                    for name, model in models.items():
                        times[name].append(seconds(model, x))
                median = {name: statistics.median(values) for name, values in times.items()}
                line = f"{out_features:>5}x{in_features:<5} rows {rows:<4} float {median['float'] * 1e6:7.0f} us"
                for method in METHODS:
                    layer = models[method][0]
                    exact = x.double() @ layer.dequantize().double().T + layer.bias.double()
                    error = ((models[method](x).double() - exact).norm() / exact.norm()).item()
                    ratios[method].append(median["float"] / median[method])
                    line += f"   {method} {ratios[method][-1]:5.2f}x ({error:.0e})"
                print(line, flush=True)
    for method, values in ratios.items():
        print(f"{method}: geometric mean {math.exp(statistics.fmean(map(math.log, values))):.2f}x of nn.Linear")


if __name__ == "__main__":
    main()
