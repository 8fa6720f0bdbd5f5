"""Every kernel and every autotune entry, compiled for real for three GPU generations without having one.

`python tests/test_kernel_compile.py 90` calls the launchers with bfloat16 tensors of head width 64 and 128, with and
without grouped heads, and has Triton compile for capability 9.0 what they would have launched. Shared memory is read
from the compiled kernel, registers and spills from the report of cuobjdump, which comes with Triton.
"""

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


@pytest.fixture(scope="module")
def reports():
    """Three compilations at a time, each in a process of its own; capability -> list of kernels."""
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
    names = {"forward_kernel", "combine_kernel", "delta_kernel", "backward_query_kernel", "backward_keys_kernel"}
    assert {kernel["name"] for kernel in kernels} == names
    assert {kernel["D"] for kernel in kernels} == {64, 128}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert kernel["stack"] == kernel["local"] == 0, f"spills: {kernel}"  # ptxas spills to the stack
        if "BLOCK_N" not in kernel:
            continue  # combine and delta have no products
        # the least that wgmma multiplies is 64 rows by a product: decoding's tile of 16 takes the older instruction
        wgmma = capability == 90 and (kernel["BLOCK_M"] >= 64 or kernel["name"] == "backward_keys_kernel")
        assert kernel["wgmma" if wgmma else "mma"] > 0 and kernel["mma" if wgmma else "wgmma"] == 0, kernel


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_entry_is_meant_for_some_gpu(reports, capability):
    """At head width 64 all that a table has for this generation was compiled: nothing was dropped as too large."""
    from nanoeemllm import kernel, kernel_backward
    for table, name in ((kernel.FORWARD + kernel.FORWARD_FEW, "forward_kernel"),
                        (kernel_backward.QUERY, "backward_query_kernel"),
                        (kernel_backward.KEYS, "backward_keys_kernel")):
        meant = {tuple(tile[1:]) for tile in table if tile.capability <= capability // 10}
        compiled = {tuple(k[x] for x in ("BLOCK_M", "BLOCK_N", "warps", "stages"))
                    for k in reports[capability] if k["name"] == name and k["D"] == 64}
        assert compiled == meant


# ---- the process that compiles ----

def compile_all(capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from nanoeemllm import kernel, kernel_backward
    from nanoeemllm.attention import Run

    class NoGPU:
        """Triton's driver, as far as compiling asks it."""
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
    triton.runtime.driver.set_active(NoGPU())
    kernel.device_limits = kernel_backward.device_limits = lambda _: (132, capability // 10, SHARED_MEMORY[capability])

    launch = triton.runtime.jit.JITFunction.run

    def compile_instead(function, *args, grid, warmup, **meta):
        report(function.__name__, meta, launch(function, *args, grid=grid, warmup=True, **meta))
    triton.runtime.jit.JITFunction.run = compile_instead

    def every_entry(tuner, *args, grid, warmup, **meta):
        tuner.warmup(*args, grid=grid, **meta)
    triton.runtime.autotuner.Autotuner.run = every_entry

    def run(rows):
        return Run(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32),
                   torch.zeros(rows, dtype=torch.int32), rows)
    for D in (64, 128):
        for H, G in ((4, 4), (4, 1)):
            for queries, splits in ((512, 1), (1, 4)):
                kernel.choose_splits = lambda *_: splits
                shapes = (queries, H), (1024, G), (1024, G), (512, G), (512, G)
                tensors = [torch.zeros(rows, heads, D, dtype=torch.bfloat16, requires_grad=queries > 1)
                           for rows, heads in shapes]
                out = kernel.composite_attention_kernel(*tensors, run(queries), run(1024), run(512))
                if queries > 1:
                    out.sum().backward()


def report(name: str, meta: dict, compiled):
    import triton
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        resources = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary],
                                   capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", resources).groups())
    ptx = compiled.asm["ptx"]
    tile = {name: meta[name] for name in ("D", "GROUP", "BLOCK_M", "BLOCK_N") if name in meta}
    print(json.dumps(dict(name=name, **tile, warps=meta.get("num_warps"), stages=meta.get("num_stages"),
                          shared=compiled.metadata.shared, registers=registers, stack=stack, local=local,
                          wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    compile_all(int(sys.argv[1]))
