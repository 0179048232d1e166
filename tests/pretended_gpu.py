"""Would the six stages run on a GPU? A pretended one shows their mistakes on a machine without.

A tensor of the device "pretended" keeps its numbers in the CPU's memory and computes there, but as on
a GPU weights are bfloat16, nothing works on tensors of two devices, and matrix products under autocast
are taken in bfloat16. Two rounds: in the second the trained adapter lies on top of the model.

Run     python tests/pretended_gpu.py tests/demo/model runs/pretended                 12 s
"""
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

torch.inference_mode = torch.no_grad  # before the stages are imported: views of such tensors need it
from families import stand_in_for_torchaudio
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "pretended:0"
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MOVES = {"to", "_to_copy", "copy_", "_copy_from"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # a GPU's tensor takes a CPU's index


class OnGpu(torch.Tensor):
    """A tensor of the pretended device; `data_` is what it holds."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device=DEVICE, requires_grad=data.requires_grad)

    def __init__(self, data):
        self.data_ = data

    def __repr__(self):
        return f"OnGpu({self.data_})"

    def __reduce_ex__(self, protocol):
        return self.data_.__reduce_ex__(protocol)

    def tolist(self):
        return self.data_.tolist()

    def untyped_storage(self):
        return self.data_.untyped_storage()

    def data_ptr(self):
        return self.data_.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """For what is made on a device: torch.zeros(3, device=DEVICE)."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """One operation of torch, on the CPU; its result lies where a GPU's would."""
    name = operation.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    on_gpu = [isinstance(tensor, OnGpu) for tensor in tensors]
    if name == "_has_compatible_shallow_copy_type" and any(on_gpu):
        return False
    if name == "_fused_sdp_choice" and any(on_gpu):
        return 0  # attention made of matrix products
    of_cpu = [tensor for tensor, gpu in zip(tensors, on_gpu) if not gpu and tensor.dim() > 0]
    if any(on_gpu) and of_cpu and name not in MOVES and not (name in INDEXES and on_gpu[0]):
        raise RuntimeError(f"{name} meets tensors of two devices, of the CPU {of_cpu[0].shape}")
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if devices:
        goes_to_gpu = devices[0].type == "pretended"
    elif name == "copy_":
        goes_to_gpu = on_gpu[0]
    else:
        goes_to_gpu = any(on_gpu)
    result = operation(*tree_map(as_on_cpu, args), **tree_map(as_on_cpu, kwargs))
    return tree_map(as_on_gpu, result) if goes_to_gpu else result


def as_on_cpu(leaf):
    if isinstance(leaf, OnGpu):
        return leaf.data_
    return CPU if isinstance(leaf, torch.device) else leaf


def as_on_gpu(leaf):
    is_on_cpu = isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnGpu)
    return OnGpu(leaf) if is_on_cpu else leaf


def empty_strided(size, stride, dtype=None, **_):
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, to, non_blocking=False):
    to.data_.copy_(source)
    return to


def autocast_linear(x, weight, bias=None):
    """torch.nn.functional.linear under autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return torch.nn.functional.linear(*(part if part is None else part.to(torch.bfloat16)
                                            for part in (x, weight, bias)))


def set_up():
    """Make the device known to torch; returns what must be kept."""
    backend = ModuleType("pretended")
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend.is_available = lambda: True
    backend.current_device = lambda: 0
    backend.device_count = lambda: 1
    _setup_privateuseone_for_python_backend("pretended", backend)
    aten = torch.library.Library("aten", "IMPL")
    every = torch.library.Library("_", "IMPL")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten.impl("linear", autocast_linear, "AutocastPrivateUse1")
    return aten, every


def main(model, run):
    libraries = set_up()
    Path(run).mkdir(parents=True, exist_ok=True)
    stand_in_for_torchaudio()
    import_module("04_advantage").prompt_rewards = lambda prompt: [0.9, 0.2, 0.4, 0.0]  # so that it learns
    asked = ["--num-prompts", 1, "--max-new-tokens", 4, "--device", DEVICE]
    train, test = (ROOT / "tests" / "demo" / f"{split}.jsonl" for split in ("train", "test"))
    a_round = [("01_sample", ["--model", model, "--num-responses", 4, "--manifest", train, *asked]),
               ("02_surprisal", ["--device", DEVICE]), ("03_tree", []), ("04_advantage", []),
               ("05_train", ["--device", DEVICE, "--gradient-checkpointing"])]
    evaluation = ("06_eval", ["--passes", 1, "--manifest", test, *asked])
    for name, options in [*a_round, *a_round, evaluation]:
        stage = import_module(name)
        sys.argv = [name, "--run", run, *map(str, options)]
        with PretendedGpu():
            stage.main(stage.parse_args())
    del libraries


if __name__ == "__main__":
    main(*sys.argv[1:])
