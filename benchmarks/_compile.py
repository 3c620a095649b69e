"""Compile recorded launches for any GPU, without one, and read what the machine code needs and does.

Triton's own runtime derives the specialisation, so that what is compiled here is what a launch with the recorded
arguments would run, on tensors whose storage is aligned to 16 bytes. Works where the kernels' modules were imported
without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

from fpcn_kernels._launch import LaunchRecord
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

# Dynamic shared memory that a program may have, in bytes, by compute capability.
SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# The first that matches; an instruction is named by its opcode up to the first point.
_CLASSES = [
    ("fp32", r"F(ADD|MUL|FMA|SEL|SETP|SET|MNMX|CHK)(2|3)?(32I)?$"),
    ("matrix", r"([HIDQ]MMA|[HIQ]GMMA|UTC\w*MMA)$"),
    ("mufu", r"MUFU$"),
    ("global load", r"(LDG|LDGSTS|LD|UBLKCP|UTMALDG)$"),
    ("global store", r"(STG|ST|RED|REDG|ATOM|ATOMG)$"),
    ("shared", r"(LDS|STS|LDSM|STSM|ATOMS)$"),
    ("shuffle", r"SHFL$"),
]
# Address, opcode, its suffixes, operands.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*([^;]*);", re.M)
_PTX_ACCESS = re.compile(r"\s(ld\.global|st\.global|cp\.async\.c[ag]|atom\.|red\.)")
_PTX_BRANCH = re.compile(r"\sbra(?:\.uni)?\s+(\$\w+);")


class _Instruction(NamedTuple):
    address: int
    opcode: str
    suffixes: str
    operands: str


class Loop(NamedTuple):
    """A loop of the machine code, without the loops inside it."""

    depth: int
    """Number of loops around it, 0 for an outermost one."""
    unrolled: int
    """Iterations of the source's loop that one of this loop does."""
    counts: dict[str, int]
    """Instructions of a warp by class: fp32, matrix, mufu, global load, ...; and what they move or compute:
    ``global bytes``, ``matrix flops``. Divided by ``unrolled`` they are those of an iteration of the source."""


class Needs(NamedTuple):
    """What a program of a kernel takes of a multiprocessor."""

    kernel: str
    registers: int
    """Registers of a thread."""
    stack_bytes: int
    """The stack of a thread, where registers that were spilled lie."""
    shared_bytes: int
    """Shared memory of a program."""


class Code(NamedTuple):
    """What the machine code of a kernel does."""

    kernel: str
    warps: int
    """Of a program."""
    straight: dict[str, int]
    """Counts as in :class:`Loop` of the code outside of all loops."""
    loops: tuple[Loop, ...]
    sass: str


def specialize(record: LaunchRecord, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """What :func:`triton.compile` would be given by a launch on a GPU of compute capability ``arch`` (90: 9.0).

    Raises:
        RuntimeError: the kernel was imported for Triton's interpreter.
    """
    kernel, _, arguments, constants = record
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"{kernel} cannot be compiled: its module was imported under TRITON_INTERPRET=1; "
            "start a process without this variable"
        )
    backend = make_backend(GPUTarget("cuda", arch, 32))
    constants = {"debug": False, **constants}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **constants
    )
    options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attributes), dict(options.__dict__)  # pyright: ignore


def compile_needs(record: LaunchRecord, arch: int) -> Needs:
    """What a recorded launch needs on a GPU of compute capability ``arch`` (90: 9.0).

    Raises:
        RuntimeError: see :func:`specialize`.
    """
    binary = _compile(record, arch)
    usage = _cuda_tool("-res-usage", cubin=binary.asm["cubin"])
    return Needs(binary.metadata.name, _usage(usage, "REG"), _usage(usage, "STACK"), binary.metadata.shared)


def compile_code(record: LaunchRecord, arch: int) -> Code:
    """The machine code of a recorded launch on a GPU of compute capability ``arch`` (90: 9.0).

    Raises:
        RuntimeError: see :func:`specialize`.
    """
    binary = _compile(record, arch)
    sass = _cuda_tool("-sass", cubin=binary.asm["cubin"])
    straight, bodies = _loops([_Instruction(int(at, 16), *rest) for at, *rest in _INSTRUCTION.findall(sass)])
    _, source_bodies = _loops(_ptx_instructions(binary.asm["ptx"]))
    loops = []
    for depth, body in bodies:
        accesses = _accesses(body)
        fitting = [n for other, ptx in source_bodies if other == depth and (n := _accesses(ptx)) and accesses % n == 0]
        loops.append(Loop(depth, accesses // max(fitting) if accesses and fitting else 1, _count(body)))
    return Code(binary.metadata.name, binary.metadata.num_warps, _count(straight), tuple(loops), sass)


def _compile(record: LaunchRecord, arch: int) -> Any:
    source, options = specialize(record, arch)
    return triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _cuda_tool(what: str, *, cubin: bytes) -> str:
    """What the CUDA tools inside Triton's package print of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # These tools find each other by PATH.
        tool = knobs.nvidia.cuobjdump.path
        environment = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(tool), os.environ.get("PATH", "")])}
        command = [tool, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _usage(usage: str, resource: str) -> int:
    return max(int(count) for count in re.findall(rf"\b{resource}:(\d+)", usage))


def _ptx_instructions(ptx: str) -> list[_Instruction]:
    """Memory accesses and branches, the only ones that _loops and _accesses ask for; addresses are line numbers."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith("$")}
    instructions = []
    for number, line in enumerate(lines):
        if branch := _PTX_BRANCH.search(line):
            instructions.append(_Instruction(number, "BRA", "", f"{labels[branch[1]]:#x}"))
        elif _PTX_ACCESS.search(line):
            instructions.append(_Instruction(number, "LDG", "", ""))
    return instructions


def _loops(code: list[_Instruction]) -> tuple[list[_Instruction], list[tuple[int, list[_Instruction]]]]:
    """The instructions outside of all loops, and (depth, those in no deeper loop) of each loop.

    A branch backwards closes a loop; a branch to itself is what follows the end of a kernel.
    """
    ends: dict[int, int] = {}
    for instruction in code:
        target = re.search(r"0x[0-9a-f]+", instruction.operands) if instruction.opcode == "BRA" else None
        if target and (start := int(target[0], 16)) < instruction.address:
            ends[start] = max(ends.get(start, 0), instruction.address)
    bodies: dict[tuple[int, int], list[_Instruction]] = {loop: [] for loop in sorted(ends.items())}
    straight = []
    for instruction in code:
        around = [loop for loop in bodies if loop[0] <= instruction.address <= loop[1]]
        # Of nested loops the innermost starts last.
        (bodies[around[-1]] if around else straight).append(instruction)
    depths = {loop: sum(o[0] < loop[0] and loop[1] <= o[1] for o in bodies) for loop in bodies}
    return straight, [(depths[loop], body) for loop, body in bodies.items()]


def _accesses(body: list[_Instruction]) -> int:
    return sum(_class(instruction.opcode).startswith("global") for instruction in body)


def _class(opcode: str) -> str:
    return next((name for name, pattern in _CLASSES if re.match(pattern, opcode)), "other")


def _count(body: list[_Instruction]) -> dict[str, int]:
    counts = Counter({name: 0 for name, _ in _CLASSES} | {"other": 0, "global bytes": 0, "matrix flops": 0})
    for instruction in body:
        # Padding behind the end of a kernel.
        if instruction.opcode == "NOP":
            continue
        kind = _class(instruction.opcode)
        counts[kind] += 1
        if kind.startswith("global"):
            counts["global bytes"] += 32 * _bytes(instruction.suffixes)
        elif kind == "matrix":
            counts["matrix flops"] += _matrix_flops(instruction)
    return dict(counts)


def _bytes(suffixes: str) -> int:
    """How many bytes a thread moves."""
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", suffixes)
    return int(width[1]) // 8 if width else 4


def _matrix_flops(instruction: _Instruction) -> int:
    """FLOPs of one warp. HMMA.1688 multiplies 16 x 8 by 8; four warps share the product of an HGMMA.64x128x8."""
    if together := re.match(r"\.(\d+)x(\d+)x(\d+)", instruction.suffixes):
        m, n, k = (int(size) for size in together.groups())
        return 2 * m * n * k // 4
    sizes = re.match(r"\.(16)(8)(\d+)", instruction.suffixes)
    return 2 * int(sizes[1]) * int(sizes[2]) * int(sizes[3]) if sizes else 0
