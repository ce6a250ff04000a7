"""A network that int8 hurts, and the smallest model that loses at most half a point.

The standardization of the pixels is part of the first layer's weights, as when a scaler is folded into a model. Pixels
near the border are hardly ever lit: their weights are large, and those of all other pixels in the same row drown in
int8's steps. Half a point is less than two of 360 samples: the test set is told sample by sample, of --seeds networks.

python examples/budget.py [--epochs 8] [--method w8a8] [--monitor val_acc] [--max-drop 0.005] [--seeds 1] [--root …]
"""

import argparse

import torch
from digits_data import Digits, DigitsNet
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tinyq_lightning import TinyQCallback, load_quantized


class RawPixelsNet(DigitsNet):
    """DigitsNet with the standardization of its input folded into its first layer; it logs its loss, too."""

    def __init__(self, width: int = 256, lr: float = 1e-3):
        super().__init__(width, lr)
        std, mean = torch.std_mean(Digits().parts["train"].tensors[0], 0)
        std[std == 0] = 1  # never lit; scikit-learn's StandardScaler does the same
        with torch.no_grad():
            self.stem.weight /= std
            self.stem.bias -= self.stem.weight @ mean

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


@torch.no_grad()
def right(path: str | None, quantized: bool) -> torch.Tensor:
    """Which samples of the test set, which neither training nor the search has seen, a file tells right."""
    net = load_quantized(path, RawPixelsNet) if quantized else RawPixelsNet.load_from_checkpoint(path)
    images, labels = Digits().parts["test"].tensors
    return net.eval()(images).argmax(-1) == labels


def run(seed: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Train, quantize within the budget, and tell the test set by each file."""
    seed_everything(seed)
    everywhere = TinyQCallback(args.method, filename=f"{args.method}-everywhere", report=False)
    spec = {"method": args.method} | ({"calibrate": 8} if args.method.startswith("w4") else {})
    mode = "min" if args.monitor == "val_loss" else "max"
    budget = TinyQCallback(spec, monitor=args.monitor, mode=mode, max_drop=args.max_drop)
    keeper = ModelCheckpoint(dirpath=f"{args.root}/{seed}", monitor="val_acc", mode="max")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False) | {"accelerator": "cpu"}
    Trainer(max_epochs=args.epochs, callbacks=[keeper, everywhere, budget], **quiet).fit(RawPixelsNet(), Digits())
    files = {f"{args.method} everywhere": everywhere.quantized_path, "within the budget": budget.quantized_path}
    return {"float": right(budget.float_path, False), **{name: right(path, True) for name, path in files.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--method", default="w8a8")
    parser.add_argument("--monitor", default="val_acc", choices=["val_acc", "val_f1", "val_loss"])
    parser.add_argument("--max-drop", default=0.005, type=lambda drop: drop if drop.endswith("%") else float(drop))
    parser.add_argument("--seeds", type=int, default=1, help="networks to train, each of another seed")
    parser.add_argument("--root", default="runs/budget", help="folder for checkpoints and reports")
    args = parser.parse_args()
    found = [run(seed, args) for seed in range(args.seeds)]
    print(f"\nOn the test set, of {args.seeds} network(s):\n")
    told = {name: torch.cat([each[name] for each in found]) for name in found[0]}
    for name, now in told.items():
        lost, gained = (told["float"] & ~now).sum().item(), (now & ~told["float"]).sum().item()
        error = (lost + gained) ** 0.5 / len(now)  # of the difference, which those that both tell alike say nothing of
        changed = f"  {lost} lost, {gained} gained: {(gained - lost) / len(now):+.4f} ± {error:.4f}"
        print(f"{name:20} test_acc {now.float().mean():.4f}{changed if name != 'float' else ''}")
    drops = [(each["float"].float() - each["within the budget"].float()).mean() for each in found]
    print(f"\n{sum(drop > 0.005 for drop in drops)} of {args.seeds} lose more than half a point within the budget")


if __name__ == "__main__":
    main()
