"""What quantizing costs pretrained models, on data most of which they never saw: all of it comes inside PyPI wheels.

python examples/real_models [--models encoder dna digits phonemes pitch] [--methods float w8a32 …] [--threads 1]

encoder all-MiniLM-L6-v2 (BERT, 6 layers): Spearman's rho with human similarity judgements (Lee's 50 news texts,
        SimLex-999, WordSim-353), and accuracy of a linear probe for the polarity of 200 film reviews, 10-fold
dna     Tiara's first stage, an MLP on k-mer frequencies: accuracy on 464 contigs of five kinds of organism
digits  a small CNN trained on MNIST: accuracy on the 1,797 digits of scikit-learn, which are another data set
pitch   CREPE, a CNN of 22 million weights: pitch of tones that are made here, within 50 cents

Times are processor time in the forward passes alone, relative to float; sizes are of the state dict; SQNR is of the
weights, the mean over layers in dB. Methods are those of the package, and int4-absmax and int4-float-scales, which
simulate four bits with a float scale for each group of 32 inputs: by its largest value, or of the least error.
"""

import argparse
import copy
import importlib
import math
import os
import platform
import time
from collections.abc import Sequence

import torch
from groups import CONTROLS, round_in_groups
from wheels import INSTALL

from tinyq_lightning import quantize
from tinyq_lightning.methods import METHODS
from tinyq_lightning.plan.plan import state_bytes
from tinyq_lightning.table import Table, format_bytes

MODELS = ("encoder", "dna", "digits", "phonemes", "pitch")
DEFAULT = ("float", "w8a32", "w8a16", "w8a8")


@torch.inference_mode()
def measure(name: str, methods: Sequence[str]) -> dict[str, tuple[dict[str, float], int, float, float]]:
    """For each method: scores, bytes, seconds of processor time in the forward pass, and the weights' SQNR."""
    model = importlib.import_module(name)
    pretrained, results = model.load().eval(), {}
    for method in methods:
        net, sqnr = copy.deepcopy(pretrained), math.nan
        if method in CONTROLS:
            sqnr = round_in_groups(net, method)
        elif method != "float":
            found = [each.weight_sqnr_db for each in quantize(net, method) if each.weight_sqnr_db is not None]
            sqnr = sum(found) / len(found)
        seconds: list[float] = []
        net.register_forward_pre_hook(lambda *_, seconds=seconds: seconds.append(-time.process_time()))
        net.register_forward_hook(lambda *_, seconds=seconds: seconds.append(time.process_time()))
        results[method] = model.score(net), state_bytes(net.state_dict()), sum(seconds), sqnr
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=["float", *METHODS, *CONTROLS], default=DEFAULT)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, ", end="")
    print(f"{args.threads} thread(s)\n")
    rows = []
    for name in args.models:
        try:
            results = measure(name, ["float", *(each for each in args.methods if each != "float")])
        except ModuleNotFoundError as error:
            raise SystemExit(f"{error.name} is not installed. To have all this script needs:\n{INSTALL}") from error
        shown = [results[method] for method in args.methods]
        rows += [[name, score, *(f"{each[0][score]:.4f}" for each in shown)] for score in results["float"][0]]
        sizes = ["" if method in CONTROLS else format_bytes(results[method][1]) for method in args.methods]
        rows.append([name, "weights", *sizes])
        rows.append([name, "SQNR dB", *("" if math.isnan(each[3]) else f"{each[3]:.1f}" for each in shown)])
        rows.append([name, "time", *(f"{each[2] / results['float'][2]:.2f}" for each in shown)])
    print(Table(["model", "", *args.methods], rows, left=2).text())


if __name__ == "__main__":
    main()
