"""``python -m wavflow_kernels``: what was built, what runs here, and why the rest does not."""

from __future__ import annotations

from . import REGISTRY, _backend, cpu


def report() -> str:
    """The state of the kernels on this machine, as text."""
    import platform

    import torch

    C = _backend.C
    lines = [f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"]
    lines.append(f"CPU: {cpu.describe()}")
    if C is None:
        lines.append(f"extension: {_backend.C_MISSING}")
    else:
        threads = "OpenMP" if C.openmp else "no OpenMP: one thread"
        lines.append(f"extension: {C.__file__}")
        level, count = cpu.current().level, torch.get_num_threads()
        lines.append(f"CPU kernels: {level}, {threads}, {count} threads")
        reason = _backend.cuda_reason()
        built = C.cuda_architectures
        lines.append(
            f"CUDA kernels: {f'built for {built}' if built else 'not built'}"
            + (f"; not running: {reason}" if reason else "; running")
        )
    reason = _backend.triton_reason(torch.device("cuda", 0))
    lines.append(f"Triton kernels: {f'not running: {reason}' if reason else 'running'}")
    for op in REGISTRY.values():
        if op.internal:
            continue
        runs = []
        for device in ("cpu", "cuda"):
            for backend in ("cpp", "triton", "library"):
                if not _backend.unavailable(op, backend, torch.device(device), torch.float32):
                    runs.append(f"{device}: {backend}")
                    break
            else:
                runs.append(f"{device}: {'compile' if device == 'cuda' else 'reference'}")
        lines.append(f"  {op.name:<20} {', '.join(runs)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
