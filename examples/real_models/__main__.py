"""What quantizing costs pretrained models, on data most of which they never saw: all of it comes inside PyPI wheels.

python examples/real_models [--models text dna digits phonemes pitch] [--threads 1]

text    all-MiniLM-L6-v2 (BERT, 6 layers): Spearman's rho with human similarity judgements (Lee's 50 news texts,
        SimLex-999, WordSim-353), and accuracy of a linear probe for the polarity of 200 film reviews, 10-fold
dna     Tiara's first stage, an MLP on k-mer frequencies: accuracy on 464 contigs of five kinds of organism
digits  a small CNN trained on MNIST: accuracy on the 1,797 digits of scikit-learn, which are another data set
pitch   CREPE, a CNN of 22 million weights: pitch of tones that are made here, within 50 cents

Times are processor time in the forward passes alone, relative to float; sizes are of the state dict.
"""

import argparse
import copy
import importlib
import os
import platform
import time

import torch
from wheels import INSTALL

from tinyq_lightning import quantize
from tinyq_lightning.plan.plan import state_bytes
from tinyq_lightning.table import Table, format_bytes

MODELS = ("text", "dna", "digits", "phonemes", "pitch")
METHODS = ("float", "w8a32", "w8a16", "w8a8")


@torch.inference_mode()
def measure(name: str) -> dict[str, tuple[dict[str, float], int, float]]:
    """For each method: scores, bytes, and seconds of processor time in the forward pass."""
    model = importlib.import_module(name)
    pretrained, results = model.load().eval(), {}
    for method in METHODS:
        net = copy.deepcopy(pretrained)
        if method != "float":
            quantize(net, method)
        seconds: list[float] = []
        net.register_forward_pre_hook(lambda *_, seconds=seconds: seconds.append(-time.process_time()))
        net.register_forward_hook(lambda *_, seconds=seconds: seconds.append(time.process_time()))
        results[method] = model.score(net), state_bytes(net.state_dict()), sum(seconds)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, ", end="")
    print(f"{args.threads} thread(s)\n")
    rows = []
    for name in args.models:
        try:
            results = measure(name)
        except ModuleNotFoundError as error:
            raise SystemExit(f"{error.name} is not installed. To have all this script needs:\n{INSTALL}") from error
        rows += [
            [name, score, *(f"{results[method][0][score]:.4f}" for method in METHODS)] for score in results["float"][0]
        ]
        rows.append([name, "weights", *(format_bytes(results[method][1]) for method in METHODS)])
        rows.append([name, "time", *(f"{results[method][2] / results['float'][2]:.2f}" for method in METHODS)])
    print(Table(["model", "", *METHODS], rows, left=2).text())


if __name__ == "__main__":
    main()
