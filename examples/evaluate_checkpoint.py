"""Post-training evaluation: what would int8 cost a checkpoint that exists already?

python examples/evaluate_checkpoint.py FLOAT.ckpt [--spec configs/w8a8.yaml] [--exclude head …]
"""

import argparse

from digits_data import Digits, DigitsNet
from lightning.pytorch import Trainer

from tinyq_lightning import TinyQCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a float checkpoint of DigitsNet, such as examples/digits.py leaves")
    parser.add_argument("--spec", default="w8a32", help="w8a32, w8a16, w8a8, or a path to YAML")
    parser.add_argument("--exclude", nargs="*", default=[], help="layers to leave float")
    args = parser.parse_args()

    tinyq = TinyQCallback(args.spec, exclude=args.exclude, when="test_start")
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[tinyq], enable_progress_bar=False)
    # one pass over the test set: the loop tests the int8 model, the float one runs beside it
    trainer.test(DigitsNet(), datamodule=Digits(), ckpt_path=args.checkpoint, verbose=False)


if __name__ == "__main__":
    main()
