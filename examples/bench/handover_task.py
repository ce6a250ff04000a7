"""Loads an exported file in a process of its own, runs it, and prints the bytes it then holds more than before."""

import json
import sys


def onnx(path):
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return lambda ids: torch.from_numpy(session.run(None, {taken.name: ids.numpy()})[0])


def openvino(path):
    import openvino
    import torch

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda ids: torch.from_numpy(compiled([ids.numpy()])[0].copy())


def pt2(path):
    import torch

    return torch.export.load(path).module()


def aoti(path):
    import torch

    return torch._inductor.aoti_load_package(path)


OPEN = {"onnx": onnx, "openvino": openvino, "pt2": pt2, "aoti": aoti}


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def main():
    import importlib

    import torch

    torch.set_num_threads(1)
    kind, path = sys.argv[1:]
    if kind in ("onnx", "openvino"):
        importlib.import_module({"onnx": "onnxruntime"}.get(kind, kind))
    before = resident()
    run = OPEN[kind](path)
    with torch.inference_mode():  # as one serves: with gradients a program keeps float weights until the result goes
        run(torch.ones(2, 64, dtype=torch.int64))
    print(json.dumps(resident() - before))


if __name__ == "__main__":
    main()
