"""The same experiment driven by YAML, through LightningCLI.

python examples/digits_cli.py fit --config configs/digits_cli.yaml
python examples/digits_cli.py fit --config configs/digits_cli.yaml --trainer.max_epochs 2
"""

from digits_data import Digits, DigitsNet
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(DigitsNet, Digits, save_config_callback=None)
