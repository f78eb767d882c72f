"""Compiled kernels wait before they read back what they have stored; torch before 2.14 forgets it."""

import inspect
import re
from typing import Any

import pytest

from forgekit import load_config
from forgekit.errors import ModelError
from forgekit.model import compiler
from forgekit.train import speed


class Line(str):
    """Stands for torch's DeferredLine: a line that belongs to a buffer."""

    def __new__(cls, name: str, code: str) -> "Line":
        return super().__new__(cls, f"{code}  # {name}")


class Code(list[str]):
    """Stands for torch's IndentedBuffer."""

    writeline = list.append


def make_kernel() -> Any:
    """A class that writes loads as torch's does, without a barrier: into the body or into the loop."""

    class Kernel:
        def __init__(self) -> None:
            self.cse = type("Cse", (), {"invalidated_stores": {"stored"}})()
            self.body, self.loads = Code(), Code()

        def get_load_buffer(self, indexing: str) -> Code:
            return self.loads if "r" in indexing else self.body

        def load(self, name: str, indexing: str) -> str:
            self.get_load_buffer(indexing).writeline(f"tl.load({name} + {indexing})")
            return name

    return Kernel


def test_a_buffer_that_was_stored_is_loaded_behind_a_barrier() -> None:
    kind = make_kernel()
    compiler.add_barriers(kind, Line)
    kernel = kind()
    assert [kernel.load(name, "r0 + x0") for name in ("given", "stored", "given")] == ["given", "stored", "given"]
    load = "tl.load({} + r0 + x0)".format
    assert kernel.loads == [load("given"), "tl.debug_barrier()  # stored", load("stored"), load("given")]
    kernel.load("stored", "x0")
    assert kernel.body == ["tl.debug_barrier()  # stored", "tl.load(stored + x0)"]
    assert kernel.get_load_buffer("r") is kernel.loads and len(kernel.loads) == 4  # asked for by somebody else


@pytest.fixture
def torch_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a class in the place of torch's, and what is changed back afterwards."""
    import torch
    from torch._inductor.codegen import triton

    def put(kind: Any) -> Any:
        monkeypatch.setattr(triton, "TritonKernel", kind)
        return torch.compiler.config

    with torch.compiler.config.patch(cache_key_tag="mine"):
        yield put


def test_the_pinned_release_waits_by_itself() -> None:
    import torch
    from torch._inductor.codegen.triton import TritonKernel

    tag, load = torch.compiler.config.cache_key_tag, TritonKernel.load
    assert compiler.wait_for_stores() and TritonKernel.load is load and torch.compiler.config.cache_key_tag == tag
    source = inspect.getsource(load)
    assert source.index("invalidated_stores") < source.index(compiler.BARRIER)


def test_an_older_release_is_mended_once_and_its_cached_graphs_are_not_used(torch_kernel: Any) -> None:
    kind = make_kernel()
    config = torch_kernel(kind)
    assert compiler.wait_for_stores()
    load = kind.load
    assert compiler.wait_for_stores() and kind.load is load
    assert config.cache_key_tag == "mine" + compiler.TAG
    compiler.check_compiler()


def test_a_release_that_cannot_be_mended_is_not_compiled_with(torch_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    kind = make_kernel()
    del kind.get_load_buffer
    config = torch_kernel(kind)
    assert not compiler.wait_for_stores() and config.cache_key_tag == "mine"
    with pytest.raises(ModelError, match=r"Take torch 2\.14 or newer, or set train\.compile: off"):
        compiler.check_compiler()
    monkeypatch.setattr(speed, "choose_device", lambda config: "cuda")
    monkeypatch.setattr(speed, "count_batches", lambda trainer: 1000)
    assert speed.choose_compile(None, load_config(None, {})) == (False, "not compiled: this torch's compiler makes mistakes in gradients (torch 2.14 does not)")  # fmt: skip


def find_unwaited(code: str) -> list[str]:
    """Return "kernel: buffer" for each load of a buffer that a Triton kernel has stored before without a barrier in between."""
    found = []
    for name, body in re.findall(r"^def (triton_\w+)\(.*?\):\n(.*?)^'''", code, re.DOTALL | re.MULTILINE):
        stored: set[str] = set()
        for line in body.splitlines():
            place = re.search(r"tl\.(load|store)\((\w+)", line)
            if compiler.BARRIER in line:
                stored.clear()
            elif place and place[1] == "store":
                stored.add(place[2])
            elif place and place[2] in stored:
                found.append(f"{name}: {place[2]}")
    return found


@pytest.mark.parametrize(("between", "found"), [("tl.debug_barrier()", []), ("pass", ["triton_red_0: in_out_ptr0"])])
def test_a_kernel_that_does_not_wait_is_found(between: str, found: list[str]) -> None:
    lines = ["tmp0 = tl.load(in_out_ptr0 + (x0))", "tl.store(in_out_ptr0 + (x0), tmp0)", between, "tmp1 = tl.load(in_out_ptr0 + (x0))"]  # fmt: skip
    kernel = "def triton_red_0(in_out_ptr0, xnumel):\n    " + "\n    ".join(lines) + "\n''', device_str='cuda')\n"
    assert find_unwaited(kernel) == found


@pytest.mark.gpu
def test_compiled_layers_give_the_gradients_of_uncompiled_ones() -> None:
    """At E2B's widths and with old numbers in free memory, where torch 2.11 without the barrier went wrong in most batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch._inductor.utils import run_and_get_code
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    from forgekit.train.fast_path import enable_fast_path

    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 15, "num_kv_shared_layers": 5}
    with torch.device("cuda"):
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**sizes, vocab_size=2000, vocab_size_per_layer_input=2000)).bfloat16()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", exclude_modules=".*altup.*|lm_head")).train()  # fmt: skip
    learned = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(10, 2000, (4, 656), device="cuda")
    labels = ids.masked_fill(torch.arange(656, device="cuda") < 556, -100)

    def find_gradients() -> Any:
        filled = torch.full((2**30,), 1e3, device="cuda")  # in the memory that the backward is given
        del filled
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in learned if p.grad is not None])

    enable_fast_path(model, memory="high")
    right = find_gradients()
    enable_fast_path(model, memory="high", compiled=True, uncompiled_batches=0)
    _, written = run_and_get_code(find_gradients)
    assert any(compiler.BARRIER in code for code in written) and not any(map(find_unwaited, written))
    lengths = [float(find_gradients().norm() / right.norm()) for _ in range(20)]
    assert all(0.5 < length < 2 for length in lengths), lengths
