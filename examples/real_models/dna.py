"""Tiara's first stage: an MLP that tells organisms apart by the k-mers in their DNA."""

import numpy as np
import torch
from torch import nn
from wheels import folder_of, run_file

KMER, FRAGMENT, FRAGMENTS, CONTIGS = 6, 5000, 4, 150
ORGANISMS = {"plast": 0, "mitochondria": 0, "bacteria": 1, "archaea": 3, "eukarya": 4}


def load() -> nn.Module:
    tiara = folder_of("tiara")
    state = torch.load(tiara / "models" / "nnet-models" / f"first_nnet_kmer_{KMER}.pkl", weights_only=True)
    shapes = [tensor.shape for name, tensor in state.items() if name.endswith("weight")]
    net = run_file(tiara / "src" / "models.py").NNet1(shapes[0][1], *(shape[0] for shape in shapes), 0.2)
    net.load_state_dict(state)
    return net


def kmer_features(contig: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """Unit vectors ``[fragments, 4**KMER]``: how often each k-mer occurs, times its inverse document frequency."""
    vectors = []
    for start in range(0, len(contig) - FRAGMENT + 1, FRAGMENT):
        windows = np.lib.stride_tricks.sliding_window_view(contig[start : start + FRAGMENT], KMER)
        codes = windows[(windows >= 0).all(1)] @ 4 ** np.arange(KMER)[::-1]
        counts = np.bincount(codes, minlength=4**KMER).astype(np.float32) * idf
        vectors.append(counts / np.linalg.norm(counts))
    return np.stack(vectors)


def score(model: nn.Module) -> dict[str, float]:
    tiara = folder_of("tiara")
    idf = np.load(tiara / "models" / "tfidf-models" / f"k{KMER}-first-stage" / "model.npy").astype(np.float32)
    base = np.full(256, -1)
    base[list(b"ACGT")] = range(4)
    right = []
    for organism, label in ORGANISMS.items():
        records = (tiara / "test" / "test_data" / f"{organism}_fr.fasta").read_text().split(">")[1:]
        for record in records[:: max(1, len(records) // CONTIGS)][:CONTIGS]:
            sequence = "".join(record.split("\n")[1:]).encode()[: FRAGMENTS * FRAGMENT]
            if len(sequence) >= FRAGMENT:
                features = kmer_features(base[np.frombuffer(sequence, np.uint8)], idf)
                right.append(model(torch.from_numpy(features)).mean(0).argmax().item() == label)
    return {"contig accuracy": float(np.mean(right))}
