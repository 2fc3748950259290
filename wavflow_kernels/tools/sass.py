"""What compiled GPU code does: its SASS, and the loads of a kernel's PTX."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# The matrix instruction of each generation of tensor cores.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")

_CODE = re.compile(r"code for (sm_\w+)")
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_USED = re.compile(r"\s*Function (\S+):$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][\w.]*)")
_FP64 = re.compile(r"D(ADD|FMA|MUL|SETP|MNMX|MMA)\b|\w+\.([\w.]*\.)?F64\b|MUFU\.\w+64H")


@dataclass
class Code:
    """One kernel as compiled for one architecture ("sm_90a")."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0  # bytes, static
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def local(self) -> int:
        """Instructions that access a thread's local memory: spilled registers and local arrays."""
        return sum(n for op, n in self.opcodes.items() if op.split(".")[0] in ("LDL", "STL"))

    @property
    def tensor(self) -> Counter[str]:
        """Tensor-core instructions by kind: HMMA (sm_80), HGMMA (sm_90), UTCHMMA (sm_100)."""
        return self._count(lambda op: op.split(".")[0] if "MMA" in op.split(".")[0] else "")

    @property
    def fp64(self) -> Counter[str]:
        """Arithmetic and conversions of float64."""
        return self._count(lambda op: op if _FP64.match(op) else "")

    @property
    def loads(self) -> Counter[str]:
        """Global loads by width: "16" bytes a thread, or "TMA"."""
        return self._count(_load_width)

    def _count(self, kind: Callable[[str], str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for op, n in self.opcodes.items():
            if kind(op):
                counts[kind(op)] += n
        return counts


def _load_width(opcode: str) -> str:
    name, *parts = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP"):
        return "TMA"
    if name not in ("LDG", "LDGSTS"):
        return ""
    bits = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return str(next((bits[p] for p in parts if p in bits), 32) // 8)


def read(cuobjdump: str, path: Path) -> list[Code]:
    """Every kernel of a cubin or of a library that holds some.

    Raises RuntimeError with cuobjdump's message where it fails.
    """
    return parse(_said(cuobjdump, "-res-usage", "-sass", str(path)))


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def usage(cuobjdump: str, cubin: bytes, architecture: str) -> Code:
    """The kernel of a cubin that holds one, without its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _said(cuobjdump, "-res-usage", file.name)
    (name,) = (match[1] for line in text.splitlines() if (match := _USED.match(line)))
    used = _USAGE.search(text)
    assert used is not None, text
    registers, stack, shared = map(int, used.groups())
    return Code(name, architecture, registers, stack, shared)


def disassemble(nvdisasm: str, architecture: str, cubins: Sequence[bytes]) -> list[Counter[str]]:
    """The opcodes of every cubin, all of one architecture.

    They go through nvdisasm as one stretch of instructions: it takes half a second to start and a
    tenth for a kernel.
    """
    parts = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(parts))
        file.flush()
        name = architecture.replace("sm_", "SM")
        text = _said(nvdisasm, "--binary", name, file.name)
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    found: list[Counter[str]] = [Counter() for _ in parts]
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            found[bisect(ends, int(match[1], 16))][match[2]] += 1
    return found


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin: what its ELF sections `.text.<kernel>` hold."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][1]
    return b"".join(
        cubin[offset : offset + length]
        for name, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    )


def parse(text: str) -> list[Code]:
    """The kernels in cuobjdump's output: for every file in it first the usage, then the code."""
    codes: list[Code] = []
    architecture = name = ""
    usage: dict[str, list[int]] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            codes[-1].opcodes[match[2]] += 1
        elif match := _CODE.search(line):
            architecture = match[1]
        elif match := _USED.match(line):
            name = match[1]
        elif match := _USAGE.search(line):
            usage[name] = [int(number) for number in match.groups()]
        elif match := _FUNCTION.match(line):
            registers, local, shared = usage[match[1]]
            codes.append(Code(match[1], architecture, registers, local, shared))
    return codes


def demangled(name: str) -> str:
    """The C++ name of a symbol, by the run-time library that torch itself needs."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype, free = ctypes.c_void_p, ctypes.CDLL(None).free
    free.argtypes = (ctypes.c_void_p,)
    status = ctypes.c_int()
    text = demangle(name.encode(), None, None, ctypes.byref(status))
    if not text:
        return name
    try:
        return ctypes.string_at(text).decode()
    finally:
        free(text)


@dataclass(frozen=True)
class Load:
    """A global load in PTX: bytes at a time, and the kernel parameters its address comes from."""

    width: int
    parameters: frozenset[int]


_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"\[\s*\w+_param_(\d+)")
_LOAD = re.compile(r"ld\.(?:[\w:]+\.)*?global(?:[.\w:]*?)(?:\.v(\d))?\.[a-z](\d+)\s")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[\w.:]*\s+\[[^]]*\],\s*(\[[^]]*\]),\s*(\w+)")


def global_loads(ptx: str) -> list[Load]:
    """The loads of a kernel. An address is followed back through the registers to `ld.param`.

    A value that was itself loaded from memory ends the way: an index that a load's address
    depends on does not count. Tensor memory copies (TMA) are left out: they are wide by nature.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    parameters: dict[str, int] = {}
    found: list[tuple[int, list[str]]] = []
    for statement in re.split(r"[;\n]", re.sub(r"//[^\n]*", "", ptx)):
        text = re.sub(r"^[{\s]*(@!?%p\d+\s+)?", "", statement)
        if match := _COPY.match(text):
            found.append((int(match[2], 0), _REGISTER.findall(match[1])))
        elif match := _LOAD.match(text):
            address = text[text.rindex("[") : text.rindex("]")]
            found.append((int(match[1] or 1) * int(match[2]) // 8, _REGISTER.findall(address)))
        elif text.startswith("ld.param") and (match := _PARAMETER.search(text)):
            for register in _REGISTER.findall(text):
                parameters[register] = int(match[1])
        elif not text.startswith(("ld.", "st.", "atom.")):
            _, _, operands = text.partition(" ")
            written, read = _split(operands)
            for register in written:
                sources[register].update(read)
    return [Load(width, _origins(registers, sources, parameters)) for width, registers in found]


def _split(operands: str) -> tuple[list[str], list[str]]:
    """Registers an instruction writes (its first operand, maybe a vector) and those it reads."""
    operands = operands.strip()
    end = operands.find("}") if operands.startswith("{") else operands.find(",")
    if end < 0:
        return [], []
    return _REGISTER.findall(operands[:end]), _REGISTER.findall(operands[end:])


def _origins(
    registers: list[str], sources: dict[str, set[str]], parameters: dict[str, int]
) -> frozenset[int]:
    pending, seen = list(registers), set(registers)
    while pending:
        new = sources[pending.pop()] - seen
        seen |= new
        pending += new
    return frozenset(parameters[r] for r in seen if r in parameters)
