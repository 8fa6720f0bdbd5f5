"""Every kernel with every entry of the tile tables, compiled for real for three GPU generations without having one.

`python tests/test_kernel_compile.py 90` calls the launchers with bfloat16 tensors of head width 64, 72 and 128, with and
without grouped heads, and has Triton compile for capability 9.0 what they would have launched. Shared memory is read
from the compiled kernel, the rest from the reports of ptxas, cuobjdump and nvdisasm, which come with Triton.
`... 90 table` prints the table of nanoeemllm/kernels/README.md.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448}  # bytes one program can have (CUDA C++ guide, table 30)
WIDTHS = (64, 72, 128)


@pytest.fixture(scope="module")
def reports():
    """As many compilations at a time as there are cores; capability -> list of kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = {capability: subprocess.Popen([sys.executable, __file__, str(capability)], env=environment,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for capability in SHARED_MEMORY}
    found = {}
    for capability, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-5000:]
        found[capability] = [json.loads(line) for line in out.splitlines()]
    return found


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_compiles_fits_and_spills_nothing(reports, capability):
    kernels = reports[capability]
    assert {kernel["name"] for kernel in kernels} == {"forward_kernel", "combine_kernel", "delta_kernel", "query_kernel",
                                                      "keys_kernel"}
    assert {kernel["D"] for kernel in kernels} == set(WIDTHS)
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["spills"] == 0, kernel
        assert kernel["remarks"] == [], f"ptxas serialises wgmma: {kernel}"
        if "STEP" not in kernel:
            continue  # combine and delta have no products
        # the least that wgmma multiplies is 64 rows by a product: decoding's tile of 16 takes the older instruction
        wgmma = capability == 90 and kernel["OWN"] >= 64
        assert kernel["wgmma" if wgmma else "mma"] > 0 and kernel["mma" if wgmma else "wgmma"] == 0, kernel
        assert "16" in kernel["copies"] and kernel["narrow"] == 0, f"not 16 bytes at a time: {kernel}"


def test_every_entry_is_meant_for_some_gpu(reports):
    """No entry of a table is dropped everywhere, as too large or for another's sake."""
    from nanoeemllm.kernels import tiles
    for table, name in ((tiles.FORWARD + tiles.FORWARD_FEW, "forward_kernel"), (tiles.QUERY, "query_kernel"),
                        (tiles.KEYS, "keys_kernel")):
        compiled = {tuple(k[x] for x in ("OWN", "STEP", "warps", "stages"))
                    for capability in reports for k in reports[capability] if k["name"] == name}
        assert {tuple(tile[2:]) for tile in table} <= compiled


# ---- the process that compiles ----

def compile_all(capability: int, show):
    import triton
    from triton.backends.compiler import GPUTarget
    from kernel_cases import Layout, Span, int32
    from nanoeemllm.kernels import _empty_grads, backward, forward, tiles

    class NoGPU:
        """Triton's driver, as far as compiling asks it."""
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
    triton.runtime.driver.set_active(NoGPU())
    triton.knobs.compilation.always_compile = True  # what comes from the cache has no report of ptxas
    triton.knobs.nvidia.dump_ptxas_log = True
    tiles.device_limits = lambda _: (132, capability, SHARED_MEMORY[capability])
    launch = triton.runtime.jit.JITFunction.run

    done = set()

    def compile_instead(function, *args, grid, warmup, **meta):
        if (case := (function.__name__, *meta.items())) in done:
            return
        done.add(case)
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = launch(function, *args, grid=grid, warmup=True, **meta)
        show(report(function.__name__, meta, compiled, log.getvalue()))
    triton.runtime.jit.JITFunction.run = compile_instead

    for D, H, G in ((64, 16, 16), (64, 16, 4), (72, 16, 16), (128, 16, 16), (128, 16, 4)):
        q, k = (torch.zeros(512, heads, D, dtype=torch.bfloat16) for heads in (H, G))
        tables = [int32(0), int32(512)] * 3 + [torch.zeros(512, dtype=torch.int32)] * 4
        keys, lengths, lse = (k,) * 4, [512, 512, 512], torch.zeros(512, H)
        forward.launch_forward(q, keys, tables, lengths, 1.0, splits=1)
        forward.launch_forward(q, keys, tables, [1, 512, 512], 1.0, splits=4)
        grads = _empty_grads(q, keys, [True] * 3)
        backward.launch_backward(q, q, lse, q, keys, tables, lengths, 1.0, [True] * 3, grads)


def report(name: str, meta: dict, compiled, log: str) -> dict:
    import triton
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        resources = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary],
                                   capture_output=True, text=True, check=True).stdout
        code = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", binary],
                              capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", resources).groups())
    ptx = compiled.asm["ptx"]
    tile = {name: meta[name] for name in ("D", "GROUP", "OWN", "STEP") if name in meta}
    copies = {str(int(width, 16)) for width in re.findall(r"cp\.async\.c.\.shared\.global .*?, (0x\w+)", ptx)}
    narrow = len(re.findall(r"ld\.global\S*\.b16", ptx))  # one number at a time: not known to be aligned
    loops = loops_with_products(code)
    return dict(name=name, **tile, warps=meta.get("num_warps"), stages=meta.get("num_stages"),
                shared=compiled.metadata.shared, registers=registers, spills=stack + local,
                wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"), copies=sorted(copies),
                narrow=narrow, remarks=re.findall(r"C75\d\d", log), instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
                loop=loops[0] if loops else None)


def loops_with_products(code: str) -> list[int]:
    """Instructions of each innermost loop that multiplies matrices, in order: the full loop comes first."""
    places, count, loops = {}, 0, []
    products = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = count
        if re.search(r"/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if "MMA" in line:
                products.append(count)
            branch = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
            if branch and branch[1] in places:
                begin = places[branch[1]]
                inner = any(begin < start for start, _ in loops)
                if any(begin < p <= count for p in products) and not inner:
                    loops.append((begin, count))
    return [stop - begin for begin, stop in loops]


COLUMNS = ("name", "D", "GROUP", "OWN", "STEP", "warps", "stages", "registers", "spills", "shared", "wgmma", "mma",
           "copies", "remarks", "loop", "instructions")


def table_row(kernel: dict) -> str:
    def text(column):
        value = kernel.get(column)
        if isinstance(value, list):
            value = len(value) if column == "remarks" else ", ".join(value)
        return "" if value is None else str(value)
    return f"| {' | '.join(map(text, COLUMNS))} |"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    if "table" in sys.argv:
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    compile_all(int(sys.argv[1]), lambda kernel: print(
        table_row(kernel) if "table" in sys.argv else json.dumps(kernel), flush=True))
