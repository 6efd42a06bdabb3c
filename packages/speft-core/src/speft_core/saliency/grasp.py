"""H g: how the gradient changes along itself, for GRaSP (SPEFT, table 1; Wang et al., arXiv 2002.07376)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from ..targets import base_parameters
from .accumulate import frozen
from .passes import Pass, Statistics, frozen_gradient, mean_gradient
from .sums import wide_dtype

HESSIANS = ("auto", "exact", "finite")
# Length of a finite difference over ‖θ‖. In fp32 on four pico architectures the error is 4e-5 to 7e-5 at 5e-5, and above 1e-4
# both at 2e-5 (rounding) and at 2e-4 (curvature; with ReLU, kinks stepped over). Parts of models compute in fp32 even when the
# weights are float64, so the step does not depend on the dtype.
STEP = 5e-5


def hessian_gradient(run: Pass, names: Sequence[str]) -> Statistics:
    """sign · H g, with g the mean gradient of all targets and H the Hessian of the mean loss in them.

    Options. sign: −1 (the paper's, default) or +1 (the published code's). hessian: "exact" differentiates twice, with the
    gradients of all targets in one graph; "finite" takes central differences of the gradient along g, works with any
    attention and within a memory limit; "auto" is exact unless there is a memory limit or something in the model cannot be
    differentiated twice, whose message the mask then keeps. step: the difference's length relative to ‖θ‖ (default 5e-5: see STEP).
    """
    sign, hessian = run.options.get("sign", -1), run.options.get("hessian", "auto")
    if sign not in (-1, 1) or hessian not in HESSIANS:
        raise UserError(f"grasp: sign must be -1 or 1 and hessian one of {', '.join(HESSIANS)}, got {sign!r}, {hessian!r}")
    run.calibration.keep()
    product: Statistics | None = None
    if hessian == "exact" or (hessian == "auto" and len(names) == len(run.all_names)):
        try:
            product = _exact(run, names)
            run.notes["hessian"] = "exact"
        except RuntimeError as error:
            if hessian == "exact" or isinstance(error, torch.OutOfMemoryError):
                raise
            run.notes["reason"] = str(error).partition("\n")[0]
    if product is None:
        product = _finite(run, names)
        run.notes["hessian"] = "finite"
    run.notes["sign"] = sign
    return {n: h.mul_(sign) for n, h in product.items()}


def _exact(run: Pass, names: Sequence[str]) -> Statistics:
    with frozen(run.model), sdpa_kernel([SDPBackend.MATH]), torch.enable_grad():
        parameters = [base_parameters(run.model)[n].requires_grad_(True) for n in run.all_names]
        wide = [wide_dtype(p.dtype) for p in parameters]

        def mean_of(terms_of: Any) -> list[torch.Tensor]:
            """The mean over examples of a list of tensors that each batch's loss gives."""
            sums = [torch.zeros(p.shape, dtype=d, device=p.device) for p, d in zip(parameters, wide, strict=True)]
            for number, batch, size in run.calibration:
                for total, term in zip(sums, terms_of(run.calibration.loss(number, batch).mean()), strict=True):
                    if term is not None:
                        total.add_(term.to(total.dtype), alpha=size)
            return [s.div_(run.calibration.examples) for s in sums]

        gradient = mean_of(lambda loss: torch.autograd.grad(loss, parameters, allow_unused=True))

        def along_gradient(loss: torch.Tensor) -> Sequence[torch.Tensor | None]:
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            products = [(g.to(v.dtype) * v).sum() for g, v in zip(first, gradient, strict=True) if g is not None]
            total = torch.stack(products).sum()
            _require_derivative(total)
            return torch.autograd.grad(total, parameters, allow_unused=True)

        return dict(zip(run.all_names, mean_of(along_gradient), strict=True))


def _require_derivative(total: torch.Tensor) -> None:
    """RuntimeError when an operation behind `total` forbids its derivative: grad() would step over it and leave its part out."""
    seen, todo = set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":  # what once_differentiable leaves in the graph
            raise RuntimeError("an operation of the model cannot be differentiated twice")
        seen.add(node)
        todo += [before for before, _ in node.next_functions]


def _finite(run: Pass, names: Sequence[str]) -> Statistics:
    parameters = {n: base_parameters(run.model)[n] for n in run.all_names}
    narrow = next((n for n, p in parameters.items() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if narrow is not None:
        raise UserError(
            f"grasp by finite differences needs fp32 weights, {narrow} is {parameters[narrow].dtype}; load the model in fp32"
        )
    if "gradient" not in run.kept:
        everywhere = Pass(run.model, run.calibration, run.all_names, dict.fromkeys(run.all_names, "cpu"))
        run.kept["gradient"] = mean_gradient(everywhere, run.all_names)
    gradient: Statistics = run.kept["gradient"]
    length = torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt().item()
    size = sum(p.detach().double().square().sum().item() for p in parameters.values()) ** 0.5
    if length == 0:
        return {n: torch.zeros_like(gradient[n]) for n in names}
    epsilon = run.options.get("step", STEP) * size / length
    with frozen(run.model) as again:  # around all of it: to freeze an attached model is to write base + values
        saved = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}

        def gradient_at(signed: float) -> Statistics:
            for name, parameter in parameters.items():
                parameter.data.copy_(saved[name].add(gradient[name], alpha=signed))
            return frozen_gradient(run, names, again)

        try:
            ahead, behind = gradient_at(epsilon), gradient_at(-epsilon)
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(saved[name])
    return {n: ahead[n].sub_(behind[n]).div_(2 * epsilon) for n in names}
