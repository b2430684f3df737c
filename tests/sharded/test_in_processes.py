"""Training spread over processes: what one process computes, at any number of them.

Each launch of torchrun runs the set-ups of several families, as starting takes longer than running.
"""

from tests.support.torchrun import torchrun

# Those that a number of processes could make a difference to; the others run in two.
IN_FOUR = (
    "replicated.losses_and_what_is_reduced", "fsdp1.hybrid_sharding",
    "fsdp1.files_are_those_of_one_process", "fsdp2.every_linear_by_itself",
    "fsdp2.rows_transposed_and_experts", "fsdp2_files.saved_files_are_the_same_bytes",
    "fsdp2_verbs.sharded_within_replicas", "tensor_parallel.linears_in_both_orders",
    "tensor_parallel.fsdp2_on_top", "pipeline.stages_cut_by_hand",
)


def test_data_parallel_in_two_processes() -> None:
    ran = torchrun(["sharded.replicated", "sharded.fsdp1", "sharded.fsdp2", "sharded.quantised"], 2)
    assert {name.partition(".")[0] for name in ran} == {
        "replicated", "fsdp1", "fsdp2", "fsdp2_files", "fsdp2_verbs", "quantised"}


def test_parts_of_a_model_in_two_processes() -> None:
    ran = torchrun(["sharded.tensor_parallel", "sharded.pipeline", "sharded.meta"], 2)
    assert {name.partition(".")[0] for name in ran} == {
        "tensor_parallel", "tensor_parallel_verbs", "tensor_parallel_weights", "pipeline", "meta"}


def test_all_in_four_processes() -> None:
    ran = torchrun(["sharded.replicated", "sharded.fsdp1", "sharded.fsdp2",
                    "sharded.tensor_parallel", "sharded.pipeline"], 4, *IN_FOUR)
    assert ran.keys() == {*IN_FOUR}


def test_hugging_face_in_two_processes() -> None:
    assert torchrun(["sharded.huggingface", "sharded.transformers_tp_plan"], 2)
