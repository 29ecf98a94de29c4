"""Making an ONNX graph small: onnxscript's constant folding and rules, then rewrites of our own until none fires.

Only standard ops come out, no name of a size becomes a number, and no matrix that several nodes read is stored twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import onnxscript.rewriter.rules.common as rules
from onnxscript.rewriter import RewritePass

from laconic.codegen.onnx.edit import Editor, Rewrite, shared_weight
from laconic.codegen.onnx.rewrites.arithmetic import divide, tanh_gelu
from laconic.codegen.onnx.rewrites.broadcasts import drop_broadcasts
from laconic.codegen.onnx.rewrites.constants import fold_layout
from laconic.codegen.onnx.rewrites.indexing import gather_rows, index_by_range
from laconic.codegen.onnx.rewrites.matmuls import fold_scales, merge_matmuls, unflatten_gemm
from laconic.codegen.onnx.rewrites.parts import hoist, regroup, slices_to_split
from laconic.codegen.onnx.rewrites.reshapes import constant_shapes, merge_reshapes, merge_transposes
from laconic.ir.silence import torch_silenced

log = logging.getLogger(__name__)

Folds = Callable[[ir.Node], bool | None]

#: The oldest operator set whose ops the rewrites know; models for older ones get onnxscript's rules alone.
OLDEST = 18
#: onnxscript's rules but three kinds: those that look whether a weight is zero, those that are quadratic in the number
#: of slices, and merging transposes, which comes last here.
RULES = [
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.flatten_to_reshape_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.fuse_pad_into_conv_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.no_op_cast_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_expand_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_transpose_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.successive_clip_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_rule,
    rules.successive_relu_clip_rule,
    rules.unsqueeze_unsqueeze_rule,
]
#: In this order: weights first, since scales and products are found behind them; transposes are merged last, when what
#: is done alike to queries, keys and values has been done to all of them at once.
REWRITES: tuple[Rewrite, ...] = (
    fold_layout,
    index_by_range,
    gather_rows,
    drop_broadcasts,
    divide,
    tanh_gelu,
    slices_to_split,
    constant_shapes,
    merge_reshapes,
    unflatten_gemm,
    fold_scales,
    merge_matmuls,
    hoist,
    regroup,
)
LAST: tuple[Rewrite, ...] = (merge_transposes, merge_reshapes)
_ROUNDS = 40  # far more than any model needs: each round but the last makes the graph smaller or its parts larger


def shrink(model: ir.Model, positive: frozenset[str] = frozenset(), parameters: frozenset[str] = frozenset()) -> None:
    """Rewrite a model in place. `positive`: names of sizes that are never 0; `parameters`: of weights, whose values
    decide nothing."""
    editor = Editor(model.graph, model.opset_imports[""], positive, set(parameters))

    def folds(node: ir.Node) -> bool | None:
        """A weight with several users is never folded into a second copy of itself; others we transpose ourselves."""
        if any(v is not None and shared_weight(v) for v in node.inputs):
            return False
        ours = node.op_type == "Transpose" and editor.opset >= OLDEST
        return False if ours and node.inputs[0] is not None and editor.is_parameter(node.inputs[0]) else None

    with torch_silenced():
        common.InlinePass()(model)
        for _ in range(2):  # folding makes patterns, and patterns leave constants
            onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=folds)
            RewritePass(RULES)(model)
    _clean(model, folds)
    for rewrites in (REWRITES, LAST) if editor.opset >= OLDEST else ():
        for _ in range(_ROUNDS):
            fired = {rewrite.__name__: count for rewrite in rewrites if (count := rewrite(editor))}
            if not fired:
                break
            log.debug("rewritten: %s", fired)
            _clean(model, folds)
    with torch_silenced():
        common.RemoveUnusedNodesPass()(model)


def _clean(model: ir.Model, folds: Folds) -> None:
    """Fold constants, remove what nobody reads, and say equal things once."""
    with torch_silenced():
        onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=folds)
        ir.passes.Sequential(
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.OutputFixPass(),
            common.NameFixPass(),
        )(model)
