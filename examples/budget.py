"""A network that int8 hurts, and the smallest model that loses at most half a point.

The usual standardization of the pixels, (x − mean) / std, is part of the first layer's weights here, as it is when a
scaler is folded into a model for serving. Pixels near the border are hardly ever lit: their std is tiny, their weights
are large, and the weights of all other pixels in the same row drown in int8's steps.

python examples/budget.py [--epochs 8] [--method w8a8] [--max-drop 0.005] [--root runs/budget]
"""

import argparse

import torch
from digits_data import Digits, DigitsNet
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tinyq_lightning import TinyQCallback, load_quantized


class RawPixelsNet(DigitsNet):
    """DigitsNet with the standardization of its input folded into its first layer."""

    def __init__(self, width: int = 256, lr: float = 1e-3):
        super().__init__(width, lr)
        pixels = Digits().parts["train"].tensors[0]
        std, mean = torch.std_mean(pixels, 0)
        std[std == 0] = 1  # never lit; scikit-learn's StandardScaler does the same
        with torch.no_grad():
            self.stem.weight /= std
            self.stem.bias -= self.stem.weight @ mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--method", default="w8a8")
    parser.add_argument("--max-drop", default="0.005", help="absolute, or a share of the float value such as 1%%")
    parser.add_argument("--root", default="runs/budget", help="folder for checkpoints and reports")
    args = parser.parse_args()
    max_drop = args.max_drop if args.max_drop.endswith("%") else float(args.max_drop)

    seed_everything(0)
    data = Digits()
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    everywhere = TinyQCallback(args.method, filename=f"{args.method}-everywhere", report=False)
    budget = TinyQCallback(args.method, monitor="val_acc", max_drop=max_drop)
    keeper = ModelCheckpoint(dirpath=args.root, monitor="val_acc", mode="max")
    trainer = Trainer(max_epochs=args.epochs, callbacks=[keeper, everywhere, budget], **settings)
    trainer.fit(RawPixelsNet(), data)

    print("\nOn the test set, which neither training nor the search has seen:\n")
    files = {"float": budget.float_path, f"{args.method} everywhere": everywhere.quantized_path}
    files["within the budget"] = budget.quantized_path
    for name, path in files.items():
        net = load_quantized(path, RawPixelsNet) if name != "float" else RawPixelsNet.load_from_checkpoint(path)
        score = trainer.test(net, data, verbose=False)[0]["test_acc"]
        print(f"{name:20} test_acc {score:.4f}")


if __name__ == "__main__":
    main()
