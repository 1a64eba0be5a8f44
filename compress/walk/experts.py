"""Fused experts: 3-D parameters ``(E, O, I)`` that one module multiplies inside, out of reach of layer hooks.

While a block is walked, the module's forward is a loop over plain linears whose weights are views of the fused
parameter: the same arithmetic in the same order as Transformers' eager implementation, bit for bit, with hooks at each
expert. Parameters and state-dict names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PARAMETERS = ("gate_up_proj", "down_proj")  # of one expert, in the order in which it runs them


def why_not_walkable(module: nn.Module) -> str | None:
    """Why the 3-D parameters of ``module`` can't be walked as experts; None if they can.

    The layout that is known: ``gate_up_proj (E, 2F, D)`` with the gate's rows first, ``down_proj (E, D, F)``, no bias.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != set(PARAMETERS):
        return f"experts of unknown layout: parameters {', '.join(sorted(parameters))}"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "experts of unknown layout: transposed or interleaved"
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        return "experts of unknown layout: no gate, or a norm per expert"
    if not hasattr(module, "num_experts") or not (hasattr(module, "act_fn") or hasattr(module, "_apply_gate")):
        return "experts of unknown layout: no num_experts or act_fn"
    gate_up, down = (parameters[name].shape for name in PARAMETERS)
    if gate_up != (down[0], 2 * down[2], down[1]):
        return f"experts of unknown layout: gate_up_proj {tuple(gate_up)}, down_proj {tuple(down)}"
    return None


def holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` itself owns 3-D weights that are no convolution's: one slice per expert."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return False
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


class UnfusedExperts:
    """The forward of a fused experts module as a loop of linears ``linears[e, "gate_up_proj" | "down_proj"]``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.linears: dict[tuple[int, str], nn.Linear] = {}
        for name in PARAMETERS:
            fused: Tensor = getattr(module, name)
            for index in range(fused.shape[0]):
                linear = nn.Linear(fused.shape[2], fused.shape[1], bias=False, device="meta")
                linear.weight = nn.Parameter(fused.data[index], requires_grad=False)
                self.linears[index, name] = linear
        self._saved = module.__dict__.get("forward")
        module.__dict__["forward"] = self.forward

    def refuse(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)
        if self._saved is not None:
            self.module.__dict__["forward"] = self._saved

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (T, D); ``top_k_index``, ``top_k_weights`` (T, k): as in Transformers' eager experts."""
        output = torch.zeros_like(hidden_states)
        count = int(self.module.num_experts)  # type: ignore[arg-type]
        for index in torch.unique(top_k_index).tolist():  # sorted
            if index >= count:  # the sentinel of expert parallelism
                continue
            choice, token = torch.where((top_k_index == index).t())
            rows = hidden_states[token]
            mark_positions(rows, token)
            rows = self._gate(self.linears[index, "gate_up_proj"](rows))
            mark_positions(rows, token)
            rows = self.linears[index, "down_proj"](rows)
            rows = rows * top_k_weights[token, choice, None]
            output.index_add_(0, token, rows.to(output.dtype))
        return output

    def _gate(self, gate_up: Tensor) -> Tensor:
        apply_gate: Callable[[Tensor], Tensor] | None = getattr(self.module, "_apply_gate", None)
        if apply_gate is not None:
            return apply_gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        activation: Callable[[Tensor], Tensor] = self.module.act_fn  # type: ignore[assignment]
        return activation(gate) * up


def mark_positions(rows: Tensor, token: Tensor) -> None:
    """Note on a tensor of dispatched rows which token of the window each row is."""
    rows._positions = token  # type: ignore[attr-defined]


def read_positions(rows: Tensor) -> Tensor | None:
    """Which token each row is, where rows were dispatched to an expert; None where rows are the tokens in order."""
    return getattr(rows, "_positions", None)
