"""Train on the digits, quantize when the training ends, reload the int8 file, and compare on the test set.

python examples/digits.py [--epochs 8] [--method w8a32] [--root runs/digits]
"""

import argparse

from digits_data import Digits, DigitsNet
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tinyq_lightning import TinyQCallback, load_quantized, quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--method", default="w8a32", help="w8a32, w8a16, w8a8, or a path to YAML")
    parser.add_argument("--root", default="runs/digits", help="folder for checkpoints and logs")
    args = parser.parse_args()

    seed_everything(0)
    data = Digits()
    tinyq = TinyQCallback(args.method)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        callbacks=[ModelCheckpoint(monitor="val_acc", mode="max"), tinyq],
        logger=CSVLogger(args.root),
        default_root_dir=args.root,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(DigitsNet(), data)

    print("On the test set, which neither training nor quantizing has seen:\n")
    net = DigitsNet.load_from_checkpoint(tinyq.float_path, weights_only=True)
    reloaded = load_quantized(tinyq.quantized_path, DigitsNet)
    scores = {"float checkpoint": trainer.test(net, data, verbose=False)[0]}
    with quantized(net, tinyq.plan.to_spec()):
        scores[f"{tinyq.plan.label}, quantized in memory"] = trainer.test(net, data, verbose=False)[0]
    scores[f"{tinyq.plan.label}, reloaded from the file"] = trainer.test(reloaded, data, verbose=False)[0]
    for model, values in scores.items():
        print(f"{model:31}" + "  ".join(f"{name} {value:.6f}" for name, value in values.items()))

    print("\nOn the validation set, the reloaded model beside the table above:\n")
    for name, value in trainer.validate(reloaded, data, verbose=False)[0].items():
        in_table = tinyq.results[name][tinyq.plan.label]
        print(f"{name} {value:.6f}, in the table {in_table:.6f}: {'the same' if value == in_table else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
