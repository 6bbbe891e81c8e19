"""What a compiler makes of the operations on a GPU, where there is none: run by test_traced.py, in a process
without the interpreter. Prints, for each kernel, the arguments that it is seen to change.
"""

import json

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hotlap.kernels import (
    attention,
    attention_forward,
    cross_entropy,
    decode_attention,
    decode_linear,
    dispatch,
    embedding,
    fp8,
    linear_cross_entropy,
    linear_relu2,
    muon,
    orthogonalize,
    qkv,
    rms_norm,
)
from hotlap.kernels.tiles import fitting_tiles

F32, BF16, I32, I64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
H100 = dispatch.Device("H100", shared_memory=227 << 10, processors=132, tma=True)


class Driver:
    """Of the GPU that kernels are looked at for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def muon_step(grad, momentum, weight, second, scalar):
    update = muon.muon_momentum(grad.unbind(), momentum, scalar, BF16)
    update = orthogonalize.orthogonalize(update, norm=4.0)
    factors = muon.muon_factors(muon.muon_squares(update), second, 16, 0.9)
    muon.muon_apply(weight.unbind(), update, factors, scalar, scalar)
    return weight.sum()


def symmetric_by_descriptors(x):
    return orthogonalize.orthogonalize(x, norm=4.0).sum()


def by_descriptors(*given):
    return linear_relu2.linear_relu2(*given).sum()


def in_two_passes(*given):
    return linear_relu2.linear_relu2(*given).sum()


def look_up(weight, ids):
    return embedding.embedding(ids, weight, BF16, accumulate=True).sum()


def decode_step(x, x0, weight, gate, scale):
    y, total, gates = decode_linear.norm_linear(x, weight, (scale, scale, x0), gate)
    return y + total + gates


def attend_to_cache(q, k, v, k_cache, v_cache, slots, lengths):
    return decode_attention.decode_attention(q, k, v, k_cache, v_cache, slots, lengths, 16)


def attend(q, k, v, document_start):
    return attention.attention(q, k, v, 16, document_start, 15.0, backend="triton").sum()


def project(projection, cos, sin, gate, value_embedding):
    q, k, v = qkv.attention_inputs(projection, 1, cos, sin, 1.2, gate, value_embedding)
    return q.sum() + k.sum() + v.sum()


def mix(x, residual, a, b):
    y, total = rms_norm.rms_norm_residual(x, residual, scales=(a, b))
    return y.sum() + total.sum()


STEPS = (  # a function that ends in a scalar, and its tensors, of which floats want gradients if it learns
    (decode_step, *[(BF16, 3, 64)] * 2, (BF16, 64, 64), (BF16, 64, 12), (BF16,)),
    (attend_to_cache, *[(BF16, 2, 1, 2, 16)] * 3, *[(BF16, 3, 32, 2, 16)] * 2, *[(I64, 2)] * 2),
    (muon_step, *[(F32, 2, 16, 48)] * 3, (F32, 2, 1, 48), (F32,)),
    (lambda *given: fp8.linear_relu2_fp8(*given).sum(), (BF16, 32, 64), (F32, 128, 64), (F32, 64, 128)),
    (lambda *given: linear_relu2.linear_relu2(*given).sum(), (BF16, 32, 64), (F32, 128, 64), (F32, 64, 128)),
    (lambda x, targets: cross_entropy.cross_entropy(x, targets, 15.0), (BF16, 32, 640), (I64, 32)),
    (linear_cross_entropy.linear_cross_entropy, (BF16, 32, 64), (F32, 640, 64), (I64, 32)),
    (look_up, (F32, 640, 64), (I64, 2, 16)),
    (attend, *[(BF16, 2, 32, 2, 16)] * 3, (I32, 2, 32)),
    (project, (BF16, 2, 32, 4, 16), *[(F32, 32, 8)] * 2, (BF16, 2, 32, 1), (BF16, 2, 32, 1, 16)),
    (mix, *[(BF16, 32, 64)] * 2, *[(BF16,)] * 2),
    (by_descriptors, (BF16, 32, 64), (F32, 128, 64), (F32, 64, 128)),
    (in_two_passes, (BF16, 32, 64), (F32, 128, 64), (F32, 64, 128)),
    (symmetric_by_descriptors, (BF16, 2, 16, 48)),
)


FORMS = {
    by_descriptors: (linear_relu2, "_linear_relu2_tma_kernel"),
    in_two_passes: (linear_relu2, "_linear_relu2_apart_kernel"),
    symmetric_by_descriptors: (orthogonalize, "_symmetric_tma_kernel"),
}


def main() -> None:
    driver.set_active(Driver())
    dispatch._decide = lambda _: "triton"
    tiled = (
        attention_forward, cross_entropy, decode_attention, decode_linear, embedding, fp8, linear_relu2, muon,
        orthogonalize, qkv, rms_norm,
    )  # fmt: skip
    for module in tiled:
        module.device_facts = lambda _: H100
    changed, operations = {}, set()

    def look(graph, _):
        for node in graph.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional
        ):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            changed[kernel.fn.__name__] = sorted(node.kwargs["tensors_to_clone"])
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operations.update(name for name in targets if name.startswith("hotlap"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    # measured to be fastest, a form that compilers cannot launch
    decode_linear.pick_tile = lambda table, rows, device: table(rows, device._replace(compute=90))[-1]
    for function, *tensors in STEPS:
        if function in FORMS:
            module, form = FORMS[function]
            module.pick_tile = lambda table, size, device, form=form: next(
                tile for tile in fitting_tiles(table, size, device) if tile.kernel == form
            )
        torch._dynamo.reset()
        with FakeTensorMode():
            given = [torch.empty(size, dtype=dtype) for dtype, *size in tensors]
            learns = function not in (attend_to_cache, decode_step, muon_step, symmetric_by_descriptors)
            given = [x.requires_grad_(learns and x.is_floating_point()) for x in given]
            loss = torch.compile(function, backend=backend, fullgraph=True)(*given)
            if learns:
                loss.backward()
    print(json.dumps({"changed": changed, "operations": sorted(operations)}))


if __name__ == "__main__":
    main()
