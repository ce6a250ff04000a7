"""Times and memory of linear layers on a GPU, as tables in Markdown: float32, bfloat16, and each method.

`python tests/gpu/times.py`, of the machine it runs on; `--device cpu` to see that it runs.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.kernels import choose_kernel
from tinyq_lightning.methods import METHODS

WARM_UP, CALLS = 3, 20


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 8192], help="inputs and outputs of a layer")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 32, 512, 4096])
    parser.add_argument("--seconds", type=float, default=90, help="what is not measured by then is left out")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    ends = time.monotonic() + asked.seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, median of {CALLS} calls\n")
    for method in METHODS.values():
        choice = choose_kernel("auto", method, 4096, 4096, device.type)
        print(f"{method.name}: {choice.kernel} ({choice.reason})")
    for size in asked.sizes:
        print(f"\n| {size} × {size} | MiB held | MiB in a call | {' | '.join(f'µs, {n} rows' for n in asked.rows)} |")
        print(f"|---|---|---|{'---|' * len(asked.rows)}")
        for label, make, dtype in variants(size, device):
            if time.monotonic() < ends:
                print(row(label, make, dtype, size, asked.rows, device), flush=True)


def variants(size, device):
    """A label, what makes the layer, and the dtype of its inputs."""
    linear = nn.Linear(size, size, bias=False).eval()
    yield "float32", lambda: copy.deepcopy(linear), torch.float32
    yield "bfloat16", lambda: copy.deepcopy(linear).bfloat16(), torch.bfloat16
    for method in ("w8a32", "w8a16", "w8a8", "w4a8"):
        yield f"{method} of bfloat16", lambda method=method: quantized(linear, method, device), torch.bfloat16
    for method in ("w8a32", "w8a8"):
        yield f"{method} of float32", lambda method=method: quantized(linear, method, device), torch.float32
    for method in ("w8a32", "w8a16", "w8a8"):
        compiled = lambda method=method: torch.compile(quantized(linear, method, device))  # noqa: E731
        yield f"{method} of bfloat16, compiled", compiled, torch.bfloat16


def quantized(linear, method, device):
    model = nn.Sequential(copy.deepcopy(linear)).to(device)
    quantize(model, method)
    return model


@torch.inference_mode(False)
@torch.no_grad()
def row(label, make, dtype, size, rows, device):
    before = allocated(device)
    try:
        model = make().to(device)
        held = allocated(device) - before
        times, most = [], 0
        for count in rows:
            x = torch.randn(count, size, device=device, dtype=dtype)
            start = allocated(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times.append(f"{1e6 * median_seconds(lambda: model(x), device):,.0f}")  # noqa: B023
            most = max(most, peak(device) - start)
    except Exception as error:  # the table is to show the rest
        return f"| {label} | {type(error).__name__}: {str(error).splitlines()[0][:80]} |"
    return f"| {label} | {held / 2**20:,.0f} | {most / 2**20:,.0f} | {' | '.join(times)} |"


def median_seconds(run, device):
    for _ in range(WARM_UP):
        run()
    return statistics.median(seconds(run, device) for _ in range(CALLS))


def seconds(run, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def allocated(device):
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
