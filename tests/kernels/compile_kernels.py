"""Compiles every kernel for every target without a GPU, with the table of launch settings.

With the chosen entries of the table every variant of a kernel is compiled; with `--candidates`, instead, the most
expensive variants with the other candidates. Prints one JSON line per build.

Run by test_kernels_compile.py in a separate process, since with TRITON_INTERPRET=1 a kernel cannot be compiled. By hand:

    python tests/kernels/compile_kernels.py [sm_80 sm_90 sm_100 gfx942] [fp32 bf16 fp16] [--candidates]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hapo_kernels import upstream
from hapo_kernels.launch import TABLE, Launch
from hapo_kernels.linear_logprob import kernel as linear_logprob
from hapo_kernels.policy_head import kernel as policy_head
from hapo_kernels.policy_loss import kernel as policy_loss
from hapo_kernels.segment_norm import kernel as segment_norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
STORAGE = ("fp32", "bf16", "fp16")
INTEGERS = {"size": "i32", "T": "i32", "advantage_stride": "i32", "V": "i32", "N": "i32", "first_label": "i32"}
NOT_FP32 = {
    "*u8": ("active_ptr", "mask_ptr", "teacher_row_ptr", "is_teacher_ptr"),
    "*i64": (
        "row_ptr",
        "offset_ptr",
        "kept_ptr",
        "chunk_segment_ptr",
        "chunk_start_ptr",
        "chunk_offset_ptr",
        "token_offset_ptr",
        "label_ptr",
    ),
    "*i8": ("constant_ptr",),
}


# For each entry of the table, the variants that use most registers.
COSTLIEST = {
    "stats_row": ("stats_row_kernel",),
    "dlogits_row": ("dlogits_row_kernel, with entropy",),
    "head_row": ("head_row_kernel, every term",),
    "policy_loss": ("policy_loss, every term",),
    "segment_norm": ("segment_kernel, by ids",),
}


def cases(launches: dict[str, Launch]):
    """(name, kernel, pointers in storage dtype, constexprs, num_warps), of the kernels that `launches` names."""
    for name, of in (("policy_loss", token_cases), ("segment_norm", segment_cases)):
        if name in launches:
            yield from of(launches[name])
    for name, of in (("stats_row", stats_cases), ("dlogits_row", dlogits_cases), ("head_row", head_cases)):
        if name in launches:
            block, warps, stages = launches[name]
            for title, kernel, storage, flags in of():
                yield title, kernel, storage, flags | {"BLOCK": block, "STAGES": stages}, warps


FULL = {
    "ADVANTAGE_PER_TOKEN": True,
    "HAS_TEACHER": True,
    "HAS_TEACHER_LOGP": True,
    "HAS_WEIGHT": True,
    "SHAPE": policy_loss.POWER.value,
    "KL": 4,
    "STRAIGHT_THROUGH": False,
    "HAS_ENTROPY": True,
    "HAS_GRADIENT": True,
}
PLAIN = dict.fromkeys(FULL, False) | {"SHAPE": 0, "KL": 0, "HAS_GRADIENT": True}


def token_cases(launch: Launch):
    shapes = {f"shape {code}": FULL | {"SHAPE": code, "KL": 0} for code in range(policy_loss.CHORD.value + 1)}
    per_token = (
        "policy_ptr",
        "behaviour_ptr",
        "teacher_ptr",
        "weight_ptr",
        "reference_ptr",
        "entropy_ptr",
        "gradient_ptr",
    )
    for name, flags in (("every term", FULL), ("surrogate only", PLAIN), *shapes.items()):
        flags = flags | {"BLOCK": launch.block}
        yield f"policy_loss, {name}", policy_loss.policy_loss_kernel, per_token, flags, launch.warps


def segment_cases(launch: Launch):
    for gather in (False, True):
        where = "by ids" if gather else "by bounds"
        for kernel in (
            segment_norm.segment_kernel,
            segment_norm.chunk_kernel,
            segment_norm.merge_kernel,
            segment_norm.write_kernel,
        ):
            flags = {"GATHER": gather, "BY_STD": True, "CHUNK": launch.block}
            flags = {key: value for key, value in flags.items() if key in kernel.arg_names}
            yield f"{kernel.__name__}, {where}", kernel, ("score_ptr",), flags, launch.warps
    yield "spread_kernel", segment_norm.spread_kernel, (), {"CHUNK": launch.block}, launch.warps


def stats_cases():
    yield "stats_row_kernel", linear_logprob.stats_row_kernel, (), {}


def dlogits_cases():
    for entropy in (False, True):
        name = f"dlogits_row_kernel, {'with' if entropy else 'no'} entropy"
        yield name, linear_logprob.dlogits_row_kernel, ("out_ptr",), {"HAS_ENTROPY": entropy}


def head_cases():
    shapes = {
        f"shape {code}": FULL | {"SHAPE": code, "KL": 0, "HAS_ENTROPY": False}
        for code in range(policy_loss.CHORD.value + 1)
        if code != policy_loss.POWER.value
    }
    for name, flags in (("every term", FULL), ("surrogate only", PLAIN), *shapes.items()):
        flags = {key: value for key, value in flags.items() if key in policy_head.head_row_kernel.arg_names}
        flags["HAS_BEHAVIOUR"] = name == "every term"
        inputs = (("", ("out_ptr",)), ("logits, ", ("logits_ptr", "out_ptr")), ("slice, ", ("out_ptr",)))
        for of, storage in inputs[:1] if name in shapes else inputs:
            where = {"WHOLE": of == "logits, ", "EVERY": name == "every term", "SLICE": of == "slice, "}
            yield f"head_row_kernel, {of}{name}", policy_head.head_row_kernel, storage, flags | where


def upstream_cases():
    for in_place, storage in ((False, ("out_ptr",)), (True, ("gradient_ptr", "out_ptr"))):
        flags = {"IN_PLACE": in_place, "BLOCK": upstream.BLOCK}
        yield (
            f"upstream_kernel, {'in place' if in_place else 'fp32'}",
            upstream.upstream_kernel,
            storage,
            flags,
            upstream.WARPS,
        )


def chosen_cases(settings, dtype):
    """(launch, case) of an architecture's chosen entries for a storage dtype, and of kernels outside the table."""
    yield from ((Launch(upstream.BLOCK, upstream.WARPS, 1), case) for case in upstream_cases())
    for kernel, entries in settings.chosen.items():
        if dtype in entries:
            launch = entries[dtype].launch
            yield from ((launch, case) for case in cases({kernel: launch}))


def candidate_cases(settings, dtype):
    """(launch, case) of the candidates that an architecture has not chosen for a storage dtype."""
    for kernel, entries in settings.chosen.items():
        # fp16 is left out, since it is as wide as bf16.
        for launch in settings.candidates[kernel] if dtype in entries and dtype != "fp16" else ():
            if launch != entries[dtype].launch:
                yield from ((launch, case) for case in cases({kernel: launch}) if case[0] in COSTLIEST[kernel])


def build(kernel, storage_pointers, flags, num_warps, dtype, target):
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in flags:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            integer = next((kind for kind, names in NOT_FP32.items() if name in names), "*fp32")
            signature[name] = f"*{dtype}" if name in storage_pointers else integer
        else:
            signature[name] = INTEGERS.get(name, "fp32")
        if name.endswith("_ptr") or name in INTEGERS:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, flags, attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def measure(binary, target):
    if target.backend == "hip":
        assembly = binary.asm["amdgcn"]
        field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
        return {
            "registers": field["vgpr_count"],
            "spills": field["vgpr_spill_count"] + field["sgpr_spill_count"],
            "loads_64": len(re.findall(r"(?:global|buffer)_load_dwordx2", assembly)),
            "loads_128": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        }
    # PTX, since a disassembly takes longer than the build; ptxas keeps the width of a load. Spilled registers are on
    # the stack, which these kernels use for nothing else.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = binary.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "loads_64": len(re.findall(r"\bld\.global(?:\.\w+)*\.(?:v2\.[bf]32|[bf]64)\b", ptx)),
        "loads_128": len(re.findall(r"\b(?:ld\.global(?:\.\w+)*\.v4\.[bf]32|cp\.async\.cg\.shared\.global)\b", ptx)),
    }


if __name__ == "__main__":
    of_what = candidate_cases if "--candidates" in sys.argv else chosen_cases
    for target_name in [name for name in sys.argv[1:] if name in TARGETS] or TARGETS:
        target = TARGETS[target_name]
        for dtype in [name for name in sys.argv[1:] if name in STORAGE] or STORAGE:
            for launch, (name, kernel, storage_pointers, flags, num_warps) in of_what(TABLE[target_name], dtype):
                binary = build(kernel, storage_pointers, flags, num_warps, dtype, target)
                found = {"kernel": name, "dtype": dtype, "target": target_name, "launch": launch}
                print(json.dumps(found | {"shared": binary.metadata.shared} | measure(binary, target)), flush=True)
