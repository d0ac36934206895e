"""Two tables: what an implementation must get right, and where public ones went wrong.

Each line points at the test that holds it. A fact is tested once, beside the code that it is about.
"""

import ast
import functools
from pathlib import Path

import pytest


ROOT = Path(__file__).parent

# What must hold for Mixture-of-Depths, expert choice and MoDE, and the tests of it.
INVARIANTS: dict[str, list[str]] = {
    # Mixture-of-Depths
    "at capacity 1 and weight 1 a layer is the dense one, gradients included": [
        "nn/test_mixture_of_depths.py::test_at_full_capacity_and_weight_one_it_is_the_dense_layer"
    ],
    "exactly C tokens are selected, of equals the earlier ones": [
        "routing/test_selectors.py::test_expert_choice",
        "routing/test_selectors.py::test_equal_scores_select_the_earliest_tokens",
    ],
    "tokens are gathered in time order and written once": [
        "routing/test_dispatch.py::test_dispatch_gathers_and_leaves_zeros",
        "routing/test_dispatch.py::test_combine_adds_weighted_updates",
    ],
    "positions and segments are the original ones": [
        "nn/test_gathered_tokens.py::test_blocks_see_true_positions_of_the_gathered_tokens",
        "nn/test_gathered_tokens.py::test_packed_documents_do_not_see_each_other",
    ],
    "skipped tokens keep their bits": [
        "routing/test_dispatch.py::test_tokens_without_a_slot_keep_their_bits",
        "nn/test_properties.py::test_tokens_that_no_expert_selected_keep_their_bits",
    ],
    "a selected token is x + r f(x), with one residual": [
        "nn/test_mixture_of_depths.py::test_equation_one"
    ],
    "skipped tokens are no keys": ["nn/test_gathered_tokens.py::test_skipped_tokens_are_not_keys"],
    "sequences are independent, and vmap is the batch": [
        "nn/test_properties.py::test_sequences_are_independent",
        "nn/test_properties.py::test_vmap_over_the_groups_is_the_batch",
    ],
    "the gradient reaches the router through selected tokens alone": [
        "nn/test_mixture_of_depths.py::"
        "test_the_gradient_reaches_the_router_through_selected_tokens_alone",
        "routing/test_gradients.py::test_gradient_by_finite_differences",
    ],
    "C is an integer that is known at trace time; one program serves all steps": [
        "routing/test_capacity.py::test_equals_exact_arithmetic",
        "nn/test_contracts.py::test_shapes_are_known_before_anything_runs",
        "nn/test_contracts.py::test_one_trace_serves_every_input",
    ],
    "routers, gates and losses compute in float32": [
        "routing/test_dtypes.py::test_narrow_activations",
        "nn/test_dtypes.py::test_narrow_activations",
    ],
    "every other layer is routed, the first is dense, one scan": [
        "models/test_patterns.py::test_every_and_offset",
        "models/test_stack.py::test_scanned_is_a_python_loop",
    ],
    "padding is never selected": [
        "nn/test_padding.py::test_nothing_in_the_padding_reaches_a_real_token"
    ],
    "FLOPs scale with the capacity, by the compiler's count": [
        "nn/test_mixture_of_depths.py::test_compiled_flops_scale_with_the_capacity"
    ],
    "the random control selects exactly C and needs a key": [
        "routing/test_selectors.py::test_random_choice_fills_exactly_its_slots",
        "routing/test_errors.py::test_what_cannot_work_raises",
    ],
    # Sampling
    "the router's cross entropy has the top-k mask as its target": [
        "routing/test_losses_and_metrics.py::test_losses",
        "routing/test_gradients.py::test_where_the_gradient_of_a_loss_ends",
    ],
    "a predictor changes no other number": [
        "routing/test_predictor.py::test_a_predictor_changes_no_bit_of_the_rest"
    ],
    "thresholds do not see the future": [
        "models/test_causality.py::test_thresholds_do_not_see_the_future"
    ],
    "top-k does, and says so": [
        "models/test_causality.py::test_top_k_sees_the_future",
        "models/test_causality.py::test_what_sees_the_future_says_so",
    ],
    "decoding is the teacher-forced forward pass, in any pieces": [
        "decoding/test_steps.py::test_decoding_is_the_forward_and_the_oracle",
        "decoding/test_steps.py::test_a_prefill_in_chunks_is_the_prefill",
    ],
    "a routed cache holds the selected tokens with their positions": [
        "decoding/test_steps.py::test_a_routed_cache_holds_the_selected_tokens_and_no_more"
    ],
    "one token is not top-1 of 1": [
        "models/test_causality.py::test_one_token_is_not_the_best_of_one"
    ],
    "nothing is dropped in silence": [
        "routing/test_selectors.py::test_a_threshold_counts_the_tokens_it_drops"
    ],
    "precision and recall stand beside accuracy": [
        "routing/test_losses_and_metrics.py::test_selection_accuracy_of_trivial_rules"
    ],
    # Expert choice
    "each expert selects k = n c / e tokens": ["routing/test_selectors.py::test_expert_choice"],
    "the softmax is not renormalised; one expert is the dense map": [
        "routing/test_gates.py::test_weights_equal_the_oracle",
        "nn/test_mixture_of_experts.py::test_a_single_expert_at_capacity_one_is_its_feedforward",
    ],
    "groups are explicit": ["nn/test_contracts.py::test_two_axes_of_groups_are_one"],
    "the balance loss is 1 at balance": [
        "routing/test_losses_and_metrics.py::test_load_balance_is_one_at_perfect_balance"
    ],
    # MoDE
    "staged: skipped tokens reach neither attention nor the expert router": [
        "nn/test_mode_layers.py::test_staged"
    ],
    "integrated: attention sees all; filled, no-op and dropped add up": [
        "nn/test_mode_layers.py::test_integrated",
        "routing/test_selectors.py::test_token_choice_accounts_for_every_assignment",
    ],
    "a no-op adds nothing, costs nothing, and learns": [
        "nn/test_mixture_of_experts.py::test_a_no_op_is_nothing",
        "routing/test_gradients.py::test_a_no_op_gets_gradient_by_competition",
    ],
    "a no-op that always wins leaves attention; one that never wins, the plain experts": [
        "nn/test_mixture_of_experts.py::test_a_no_op_that_always_wins_leaves_attention_alone",
        "nn/test_mixture_of_experts.py::test_a_no_op_that_never_wins_is_as_if_it_were_not_there",
    ],
    "the control by smaller capacity costs the same": [
        "nn/test_mode_layers.py::test_the_control_costs_what_the_integrated_layer_costs"
    ],
    "the selection bias changes the choice and not the weight, and no optimizer has it": [
        "nn/test_mixture_of_experts.py::test_every_gate_with_expert_and_token_choice",
        "routing/test_router_state.py::test_several_updates_follow_the_oracle",
        "routing/test_surgery.py::test_no_optimizer_moves_router_state",
    ],
    "arms are compared at equal training FLOPs": [
        "models/test_patterns.py::test_the_training_flops_of_a_routed_model"
    ],
}

# Errors of public implementations, and the tests that would fail with them.
PEERS: dict[str, list[str]] = {
    "x + w (x + f(x)): the residual twice": ["nn/test_mixture_of_depths.py::test_equation_one"],
    "the weight scales the residual of a module with its own": [
        "nn/test_mixture_of_depths.py::test_a_module_with_a_skip_connection_of_its_own"
    ],
    "the weight scales the feed-forward alone": ["nn/test_mixture_of_depths.py::test_equation_one"],
    "x * mask: skipped tokens lose their residual": [
        "nn/test_properties.py::test_tokens_that_no_expert_selected_keep_their_bits"
    ],
    "score > k-th score: k - 1 tokens": [
        "routing/test_selectors.py::test_equal_scores_select_the_earliest_tokens"
    ],
    "rotary angles by rank": [
        "nn/test_gathered_tokens.py::test_blocks_see_true_positions_of_the_gathered_tokens"
    ],
    "tokens in the order of their scores": [
        "routing/test_dispatch.py::test_dispatch_gathers_and_leaves_zeros"
    ],
    "no causal mask among the selected": ["nn/test_mixture_of_depths.py::test_equation_one"],
    "top-k over the flattened batch": ["nn/test_properties.py::test_sequences_are_independent"],
    "a softmax over the tokens": ["routing/test_gates.py::test_weights_equal_the_oracle"],
    "padding takes slots by its score": [
        "nn/test_padding.py::test_nothing_in_the_padding_reaches_a_real_token"
    ],
    "the router gets no gradient": [
        "nn/test_contracts.py::test_gradients_are_finite_and_reach_every_parameter"
    ],
    "targets without the offset of their row": ["routing/test_losses_and_metrics.py::test_losses"],
    "the predictor reads the block's output": [
        "routing/test_router.py::test_every_gate_with_every_selector"
    ],
    "the predictor's sigmoid is the weight": [
        "decoding/test_steps.py::test_decoding_is_the_forward_and_the_oracle"
    ],
    "k = int(c T) = 0 for short sequences": [
        "routing/test_capacity.py::test_bounds_and_alignment",
        "nn/test_mixture_of_depths.py::test_one_sequence_at_any_capacity",
    ],
    "every decoded token goes through every block": [
        "models/test_causality.py::test_one_token_is_not_the_best_of_one"
    ],
    "a mask computes everything": [
        "nn/test_mixture_of_depths.py::test_compiled_flops_scale_with_the_capacity"
    ],
    "outputs of experts are scrambled over the batch": [
        "nn/test_mixture_of_experts.py::test_every_gate_with_expert_and_token_choice"
    ],
    "the capacity depends on the number of calls": [
        "nn/test_contracts.py::test_one_trace_serves_every_input"
    ],
    "one router for all layers": [
        "models/test_stack.py::test_every_layer_has_parameters_and_a_router_of_its_own"
    ],
    "empty slots are keys": ["nn/test_mixture_of_depths.py::test_equation_one"],
    "0 * NaN from empty slots": [
        "nn/test_mixture_of_experts.py::test_what_an_expert_makes_of_an_empty_slot_is_not_read"
    ],
    "a no-op is expert 0": ["nn/test_mixture_of_experts.py::test_a_no_op_is_nothing"],
    "a second choice evicts a first": [
        "routing/test_selectors.py::test_token_choice_serves_in_time_order_and_not_by_rank"
    ],
    "padding is in the losses": [
        "routing/test_losses_and_metrics.py::test_padding_counts_for_nothing"
    ],
    "losses are collected through globals": ["models/test_stack.py::test_scanned_is_a_python_loop"],
    "an attention option is lost from the second decode step on": [
        "decoding/test_attention_functions.py::test_an_option_decodes_in_dense_and_in_routed_layers"
    ],
    "two new tokens after a past are wrong in silence": [
        "decoding/test_steps.py::test_decoding_is_the_forward_and_the_oracle"
    ],
}


@functools.cache
def functions(path: Path) -> frozenset[str]:
    """The functions at the top of a file."""
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("table", [INVARIANTS, PEERS], ids=["invariants", "peers"])
def test_every_line_points_at_a_test(table: dict[str, list[str]]) -> None:
    """A test that is renamed or removed takes its line along."""
    for claim, tests in table.items():
        assert tests, claim
        for test in tests:
            file, _, name = test.partition("::")
            assert name in functions(ROOT / file), f"{claim}: there is no {test}"
